"""The bearer token that a reward server and `RemoteReward` share."""

import re

TOKEN_VARIABLE = "FLOWRL_REWARD_TOKEN"


def checked_token(token: str, source: str) -> str:
    """The token, if it can stand in a header and nobody can guess it; raises `ValueError`, which does not quote it.

    `source` says in the error where the token comes from.
    """
    if not isinstance(token, str):
        raise TypeError(f"{source} must be a string, not {type(token).__name__}.")
    if not re.fullmatch(r"[A-Za-z0-9._~+/=-]{16,1024}", token):
        raise ValueError(
            f"{source} must have 16 to 1024 characters, each a letter, a digit or one of ._~+/=-; "
            '`python -c "import secrets; print(secrets.token_urlsafe())"` prints a good one.'
        )
    return token
