"""What a newcomer brings: a tiny checkpoint in the hub's layout, as transformers writes it, and rows as LLaMA-Factory reads them.

    python tests/newcomer_world.py FOLDER

writes FOLDER/checkpoints/mine (random weights in bfloat16, its own chat template and generation settings) and FOLDER/data
(dataset_info.json, a sharegpt file with pictures of one colour), and the same rows as ms-swift has them in FOLDER/swift.jsonl.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 210), "yellow": (240, 200, 30)}
QUESTION = "<image>Which colour is the picture?"
TEMPLATE_MARK = "{# as published #}"
TINY = {
    "tie_word_embeddings": False,
    "text_config": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 2048, "tie_word_embeddings": False, "initializer_range": 0.08,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    },
    "vision_config": {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [1], "initializer_range": 0.08,
    },
}  # fmt: skip


def write_rows(folder: Path, rows: int = 800, seed: int = 0) -> None:
    """`dataset_info.json`, a sharegpt file, and its pictures."""
    rng = random.Random(seed)
    (folder / "pictures").mkdir(parents=True)
    conversations = []
    for number in range(rows):
        name = rng.choice(sorted(COLOURS))
        picture = Image.new("RGB", (rng.randint(60, 100), rng.randint(60, 100)), COLOURS[name])
        ImageDraw.Draw(picture).line((0, 0, *picture.size), "white")
        picture.save(folder / "pictures" / f"{number}.png")
        turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": f"It is {name}."}]
        conversations.append({"conversations": turns, "images": [f"pictures/{number}.png"]})
    swift = [
        {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": row["conversations"][1]["value"]}],
         "images": [f"{folder.name}/{row['images'][0]}"]}
        for row in conversations
    ]  # fmt: skip
    (folder.parent / "swift.jsonl").write_text("".join(json.dumps(row) + "\n" for row in swift))
    (folder / "colours.json").write_text(json.dumps(conversations, indent=1))
    entry = {"file_name": "colours.json", "formatting": "sharegpt", "columns": {"messages": "conversations", "images": "images"}}
    (folder / "dataset_info.json").write_text(json.dumps({"colours": entry}, indent=1))


def write_checkpoint(folder: Path) -> None:
    """Qwen2.5-VL in miniature, written by transformers' own `save_pretrained`."""
    import torch
    from transformers import AutoModelForImageTextToText, GenerationConfig

    from terrace.data.tokenizer import train_tokenizer
    from terrace.families.registry import family_class
    from terrace.models.build import model_config
    from terrace.recipe.schema import Model

    family = family_class("qwen2_5_vl")
    words = ["Which colour is the picture? It is red. It is green. It is blue. It is yellow. You are a helpful assistant. system user"]
    tokenizer = train_tokenizer(words * 40, 400, folder, family)
    config = model_config(Model(architecture="qwen2_5_vl", config=TINY), tokenizer)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=config.text_config.eos_token_id, do_sample=True, temperature=0.7, top_k=1)
    model.save_pretrained(folder)
    made = family.of(TINY)
    (folder / "preprocessor_config.json").write_text(json.dumps(made.preprocessor((784, 12_845_056))))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = TEMPLATE_MARK + settings.pop("chat_template")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    write_rows(Path(sys.argv[1]) / "data")
    write_checkpoint(Path(sys.argv[1]) / "checkpoints" / "mine")
