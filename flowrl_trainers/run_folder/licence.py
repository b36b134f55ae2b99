"""The licence of a base model, as its own card names it."""

from huggingface_hub import ModelCard, hf_hub_download

from .card import SHAPES

SECONDS = 3  # in which the Hub must answer


def licence_of(base_model: str | None, *, offline: bool = False) -> dict[str, str]:
    """`license`, `license_name` and `license_link` of a base model; empty where neither the Hub nor the cache knows.

    Args:
        base_model: A Hub id, `flowrl_trainers.shapes`, or None.
        offline: Whether to look into the cache alone.
    """
    if base_model is None or base_model == SHAPES:
        return {} if base_model is None else {"license": "apache-2.0"}
    try:
        file = hf_hub_download(base_model, "README.md", etag_timeout=SECONDS, local_files_only=offline)
        data = ModelCard.load(file, ignore_metadata_errors=True).data
    except Exception:  # no answer of the Hub and no text of a card may end a run
        return {}
    known = {name: data.get(name) for name in ("license", "license_name", "license_link")}
    licence = {name: value for name, value in known.items() if isinstance(value, str)}
    if "license_link" in licence and "://" not in licence["license_link"]:
        licence["license_link"] = f"https://huggingface.co/{base_model}/blob/main/{licence['license_link']}"
    return licence if "license" in licence else {}
