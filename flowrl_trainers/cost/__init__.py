"""What a configuration costs before anything runs: calls, operations, memory."""

from .calls import Call, Drawing, Kind, Phase, counted

__all__ = ["Call", "Drawing", "Kind", "Phase", "counted"]
