"""lavin-mini: a small LaVin-DiT that comes with the package, with its tasks, templates, scenes and trainer.

It shows what the architecture does, and lets every change that is not exact be judged by what it does to task figures.
It knows scenes of spheres, boxes and cylinders at 64 x 64 pixels, not the world.

* `weights/`: a J-DiT (hidden size 216, depth 10, 9 heads of 24, 3 key/value heads, 13.9 M parameters) and an ST-VAE
  (widths 64, 64, 64, 64, 3.9 M parameters), float16, under the official names.
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

The weights are of four runs of the preset `mini` on one H200 each (torch 2.11, sixteen processor cores that rendered
the pieces meanwhile); `training_log.jsonl` has all of them, the last two with some steps after the weights that were
kept:

| run | minutes | samples a second | seen |
|---|---|---|---|
| VAE, 1,363 steps, rate 1e-3 | 1.7 | 3,900 pictures | 0.35 M pictures |
| VAE, from there 3,126 steps, rate 5e-4 falling | 3.3 | 3,800 pictures | 0.74 M pictures |
| transformer, 3,900 steps, rate 1e-3 | 5.0 | 20,000 contexts, 17,000 beside tests | 5.3 M contexts, 0.51 G tokens |
| transformer, on 260 pieces 2,960 steps, rate falling | 4.1 | 16,000 contexts | 3.9 M contexts, 0.39 G tokens |
| transformer, on new pieces 10,900 steps, rate falling | 14.0 | 17,100 contexts | 14.4 M contexts, 1.43 G tokens |

The VAE then keeps 33.8 dB of training's mix of pictures and 27.2 dB of held-out photographs.

The last one had the shares of tasks that `world/tasks` has now, the rate 8e-4 falling to 1.7e-4, and
`--warm-start mini --seed 1`.

From an empty folder `python -m lavin_rt.mini.train --preset mini --output DIR --cache DIR` does it in one run of about
that length (8,000 and 16,000 steps). A run before those diverged within two hundred steps: torch 2.11 fuses the
gradients of queries and keys wrongly on an H200. `train/compiled` compares compiled gradients with plain ones, and
compiles the transformer's blocks without fusion since.
"""
