"""What the playground says of a model: names and values out of its file, none of them trusted."""

from collections.abc import Mapping
from typing import Any

DIGEST_SHOWN = 12
LONGEST_VALUE = 300
# What a training may have noted in its model's file, besides what is derived here.
NOTED = {"preset": "Preset", "step": "Step", "run_id": "Run", "corpus": "Corpus"}


def model_card(header: Mapping[str, Any], run_id: str, preset: str = "") -> dict[str, str]:
    """Of a prior's header (`weights.read_header`); `run_id` is MLflow's.

    `preset` is the one that has these sizes; both are empty if unknown.
    """
    config, metadata = header["config"], header["metadata"]
    training = metadata.get("training", {})
    noted = {"preset": preset, "step": training.get("steps"), "run_id": run_id} | {
        name: metadata[name] for name in NOTED if name in metadata
    }
    card = {NOTED[name]: value for name, value in noted.items() if value not in (None, "")}
    card |= {
        "Prior": f"{config['n_layers']} layers, {config['n_heads']} heads, "
        f"{config['d_model']} wide",
        "Picture": f"{config['grid']} × {config['grid']} of {config['image_vocab_size']:,} codes",
        "Prompt": f"up to {config['text_len'] - 1} tokens",
    }
    for name, key in (
        ("Training data", "tokens_digest"),
        ("Tokenizer", "tokenizer_sha256"),
        ("First stage", "dvae_sha256"),
    ):
        if digest := metadata.get(key):
            card[name] = f"sha256 {str(digest)[:DIGEST_SHOWN]}"
    return {name: str(value)[:LONGEST_VALUE] for name, value in card.items()}
