"""What a user may have meant by a name that nobody knows."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(names: Iterable[str], known: Iterable[str]) -> str:
    """` (did you mean 'max_steps' and 'seed'?)`: the known names that some of the names resemble, or nothing."""
    known = list(known)
    close = [get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.75) for name in names]
    meant = " and ".join(dict.fromkeys(repr(match) for matches in close for match in matches))
    return f" (did you mean {meant}?)" if meant else ""
