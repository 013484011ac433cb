"""TRL's GRPOTrainer on the same weights, prompts, lengths and reward as the stage of bench_rl.py. Nothing of Terrace is imported."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from imposed_lengths import drawn, impose_on_transformers


def run_trl(folder: Path, args: argparse.Namespace, marks: Any) -> dict[str, float]:
    """Seconds of a training step of TRL, from its own weights folder."""
    import torch
    from trl_model import trl_model

    torch.set_num_threads(args.threads)
    from datasets import Dataset
    from PIL import Image
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    processor, model = trl_model(folder / "weights", args.pixels)
    rows = [json.loads(line) for line in (folder / "digits.jsonl").read_text().splitlines()]
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["messages"][0]["content"].removeprefix("<image>")}],
                "image": Image.open(folder / row["images"][0]).convert("RGB"),
            }
            for row in rows
        ]
    )

    class Clock(TrainerCallback):
        def on_step_end(self, *_args, **_keywords):
            marks.mark()

    def digits(completions, **_):
        texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
        texts = [t if isinstance(t, str) else "".join(part.get("text", "") for part in t) for t in texts]
        return [sum(char.isdigit() for char in text) / max(len(text), 1) for text in texts]

    batch = args.prompts * args.samples
    config = GRPOConfig(
        output_dir=str(folder / f"trl-{args.lengths}"),
        per_device_train_batch_size=batch,
        num_generations=args.samples,
        gradient_accumulation_steps=1,
        max_completion_length=args.tokens,
        beta=0.0,
        loss_type="dapo",
        learning_rate=1e-4,
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        max_steps=args.iterations,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[digits],
        args=config,
        train_dataset=data,
        processing_class=processor,
        callbacks=[Clock()],
    )
    lengths = drawn(args.lengths, args.prompts * args.iterations, args.samples, args.tokens)
    impose_on_transformers(model, lengths, processor.tokenizer.eos_token_id)
    trainer.train()
    return marks.figures() | {"response_tokens": float(lengths.sum()) / args.iterations}
