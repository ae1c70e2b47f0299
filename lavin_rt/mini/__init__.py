"""lavin-mini: a small LaVin-DiT that comes with the package, with its tasks, templates, scenes and trainer.

It shows what the architecture does, and lets every change that is not exact be judged by what it does to task figures.
It was trained on two shared CPU cores within an hour: it knows scenes of spheres, boxes and cylinders at 64 x 64
pixels, not the world.

* `weights/`: a J-DiT (hidden size 216, depth 5, 3 heads of 72, one key/value head, 7.0 M parameters) and an ST-VAE
  (widths 32, 32, 64, 64, 2.8 M parameters), float16, under the official names.
* `template/`: eight example pairs of each of the fifteen tasks, in the official layout.
* `tasks`: thirteen tasks of pictures and two of clips as functions; `deraining` and `image_from_normals` are never
  trained, to see what generalises.
* `scenes`, `sources`, `data`, `corpus`: scenes ray-cast by embree, with depth, normals and masks exactly known,
  textured and mixed with photographs that ship inside scikit-image and scikit-learn. Training, templates and
  evaluation have ranges of scene seeds and files of photographs of their own.
* `principal`, `start`, `train_vae`: the VAE. Its encoder is not learned but computed: the sixteen principal components
  of 8 x 8 patches, written into the weights of the official architecture. Its decoder begins as the inverse and is
  then trained on pictures and clips. It holds for 64 x 64 pixels; at other sizes latents are on another scale.
* `latents`, `train_dit`, `training`: the transformer, by conditional flow matching (LaVin-DiT, arXiv 2411.11505,
  section 3.3) on contexts of one to four random pairs, times logit-normal, the null condition one time in ten, averaged
  weights. At first contexts had one pair and no clips; longer contexts and clips came in later, as
  `training_log.jsonl` shows.
* `measures`, `evaluation`: the paper's figures, held-out queries and the yardsticks.

`python -m lavin_rt.mini.train --output DIR --cache DIR` trains from nothing, goes on where it stopped, or goes on from
given weights (`--warm-start`).
"""
