"""A short training for `torchrun` (see test_mini_adapting.py).

`sharded_training.py FOLDER STEPS [ALL]`: a training of ALL steps, STEPS by default, that ends after STEPS.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lavin_rt.mini.train.dit import TransformerRun
from lavin_rt.mini.train.trainer import Trainer
from support.mini_pools import SMALL, contexts, plan_of

if __name__ == "__main__":
    torch.set_num_threads(1)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    plan, last, progress = plan_of(int(sys.argv[-1])), int(sys.argv[2]), Trainer.progress.fget
    Trainer.progress = property(lambda self: 1.0 if self.step >= last else progress(self))
    TransformerRun(SMALL, Path(sys.argv[1]), plan, compile=False, checkpointing=True).train(contexts(plan))
    if dist.is_initialized():
        dist.destroy_process_group()
