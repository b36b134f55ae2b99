"""What a configuration costs before anything runs: calls, operations, memory.

`flowrl estimate` and the settings of the methods meet here. The heavy part, which builds networks, is imported by the
names that need it, as every configuration imports this room.
"""

from .calls import Call, Drawing, Kind, Phase, counted

__all__ = ["Call", "Drawing", "Kind", "Phase", "counted"]
