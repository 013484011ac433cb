"""Instance discrimination: every picture is a class of its own, whose vector a bank remembers from the last time it was seen.

    loss of a picture i = -log softmax(z_i.bank / t) of its own row

z is the projector's vector of one view, of length 1. After the step the bank's row becomes m row + (1 - m) z, of length 1 again. Rows are
found by the sample, in the order in which samples are first seen; a new one starts as a random vector of (stage seed, sample).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from terrace.data.types import PackedExample
from terrace.objectives.self_supervised import Seen, Told, ViewsObjective, unit


class InstanceDiscrimination(ViewsObjective):
    name = "instance_discrimination"
    compares = False
    judges = False  # a held-out picture has no row

    def first_state(self) -> dict[str, torch.Tensor]:
        device, width = self.opening.context.device, self.options.output_width
        self._rows: dict[int, int] = {}
        return {"keys": torch.zeros(0, dtype=torch.int64, device=device), "bank": torch.zeros(0, width, device=device)}

    def load(self, source: Callable[[str], torch.Tensor]) -> None:
        super().load(source)
        self._rows = {key: row for row, key in enumerate(self.kept["keys"].tolist())}

    def before(self, examples: Sequence[PackedExample], scale: float) -> None:
        """New samples of the global batch get their rows first."""
        super().before(examples, scale)
        own = [self.key_of(source, sample) for pack in examples for source, sample in zip(pack.sources, pack.sample_ids)]
        seen = self._together.rows(torch.tensor(own, dtype=torch.int64, device=self.opening.context.device)).tolist()
        new = [key for key in dict.fromkeys(seen) if key not in self._rows]
        if not new:
            return
        rows = [np.random.default_rng([self.opening.stage.seed, key]).standard_normal(self.options.output_width) for key in new]
        self._rows |= {key: len(self._rows) + place for place, key in enumerate(new)}
        keys, bank = self.kept["keys"], self.kept["bank"]
        self.kept["keys"] = torch.cat([keys, torch.tensor(new, device=keys.device)])
        self.kept["bank"] = torch.cat([bank, unit(torch.from_numpy(np.asarray(rows, np.float32)).to(bank))])

    def losses(self, heads: Any, seen: Seen) -> Told:
        vectors = unit(heads.projected(seen.features))
        rows = torch.tensor([self._rows.get(key, -1) for key in seen.keys.tolist()], dtype=torch.int64, device=vectors.device)
        if bool((rows < 0).any()):  # held-out pictures
            return Told(vectors.new_zeros(len(vectors)), vectors)
        logits = vectors[:, 0] @ self.kept["bank"].to(vectors).T / self.options.temperature
        losses = logits.logsumexp(1) - logits.gather(1, rows[:, None])[:, 0]
        return Told(losses, vectors, {"vectors": vectors[:, 0], "rows": rows})

    def remember(self, kept: dict[str, torch.Tensor], sums: dict[str, torch.Tensor], pictures: int) -> None:
        """A sample that stands in the batch twice is remembered as it stood last."""
        rows, vectors, stays = kept["rows"].tolist(), kept["vectors"].float(), self.options.bank_momentum
        places = torch.tensor(list({row: place for place, row in enumerate(rows)}.values()), dtype=torch.int64, device=vectors.device)
        last, bank = kept["rows"][places], self.kept["bank"].clone()
        bank[last] = unit(stays * bank[last] + (1.0 - stays) * vectors[places])
        self.kept["bank"] = bank


open_objective = InstanceDiscrimination
