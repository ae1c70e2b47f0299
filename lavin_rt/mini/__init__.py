"""lavin-mini: a small LaVin-DiT that comes with the package, with its tasks, templates, scenes and trainer.

It shows what the architecture does, and lets every change that is not exact be judged by what it does to task figures.
It knows scenes of spheres, boxes and cylinders at 64 x 64 pixels, not the world.

* `weights/`: a J-DiT (hidden size 216, depth 5, 3 heads of 72, one key/value head, 7.0 M parameters) and an ST-VAE
  (widths 32, 32, 64, 64, 2.8 M parameters), float16, under the official names.
* `template/`: eight example pairs of each task, of a family by its first member, in the official layout.
* `world/tasks`: all tasks as functions, of pictures and of clips. There `perception` says what is to be seen,
  `restorations` undo what was done to a picture, `moving` are those of clips; `families` are mappings that only the
  pairs tell, each with members that are trained and members that never are. The transformer is never trained on
  `deraining` and `image_from_normals`, to see what generalises. `encodings` and `figures` turn depth, normals,
  segments, boxes, flow and joints into pictures and back.
* `world/scenes`, `sources`, `data`, `corpus`: scenes ray-cast by embree, with depth, normals, masks, flow and the
  colours without shadows exactly known, textured and mixed with photographs that ship inside scikit-image and
  scikit-learn. Training, templates and evaluation have ranges of scene seeds and files of photographs of their own.
* `world/pieces`: worker processes render scenes and make all tasks' pairs of them, while training already runs.
* `train/vae`: the VAE, encoder and decoder learned on pictures, photographs and clips, its latents of unit variance.
* `train/latents`, `dit`, `trainer`, `compiled`: the transformer, by conditional flow matching (LaVin-DiT, arXiv
  2411.11505, section 3.3) on contexts of one to five random pairs, times logit-normal, the null condition one time in
  ten, averaged weights. All latents lie on the device, where contexts are drawn.
* `train/sharded`, `folders`, `presets`: the same for networks of any size and anybody's pairs, all parameters, sharded
  over processes by FSDP2, or low-rank adapters.
* `world/measures`: the paper's figures. `lavin-rt bench quality` draws the held-out queries and sets the yardsticks.

`python -m lavin_rt.mini.train --output DIR --cache DIR` trains from nothing, goes on where it stopped, or goes on from
given weights (`--warm-start`).

**The shipped weights are older than the trainer and most tasks.** They are of the sixteen tasks that have a folder in
`template/`, some of which are defined otherwise since (colorization without hints, symmetric blur, photographs from
depth), and their VAE is a linear one. `training_log.jsonl` shows their three runs of the transformer on two shared
CPU cores: 6800 steps; then 14000 steps by `--warm-start`, `negative` coming in at step 7600; then 560 steps at a lower
rate, half of them clips. By the log's clocks that took 42 minutes for the VAE, 43, 88 and 3 for the transformer.

The preset `mini` (13.9 M parameters, 33 tasks, a learned VAE) has run once, on an H200, for fourteen minutes
(`benchmarks/results/h200-mini-training.jsonl`). Its VAE reached 30.7 dB on training's mix of pictures and 25.9 dB on
held-out photographs before clips spoilt it; `start/stvae.safetensors`, which is not part of the installed package, is
it at that point, for `--vae`. Its transformer saw nine million samples in seven minutes and diverged within the first
two hundred steps, which the plain computation does not do; compiled gradients are held against plain ones since.
"""
