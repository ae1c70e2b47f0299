// The whole way from pictures to a picture, on an artifact.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "network.h"

namespace lavin {

// (evaluations done, evaluations in all)
using Progress = std::function<void(int64_t, int64_t)>;

// Keys and values of a context's frames [depth, 1, frames, h / 2, w / 2, columns], keys with their rotary positions.
struct Kept {
  at::Tensor keys, values;
};

class Runner {
 public:
  // Checks an artifact's files and loads its networks, the denoiser that a speed takes. Throws InputError for whatever
  // cannot be used, and before anything is loaded for steps beside a speed that has a grid of its own.
  Runner(const fs::path& folder, at::Device device, const std::string& speed, std::optional<int64_t> steps);

  const Manifest& manifest() const { return manifest_; }

  // Keys and values of a task's frames [1, 16, frames, h, w], over a query and a target of zeros; nothing where the
  // speed does not make them once a task.
  Kept context_keys(const at::Tensor& context) const;

  // Scaled latents [1, 16, 1, H / 8, W / 8] float32 of a picture uint8 [3, H, W]: the posterior's mean.
  at::Tensor encode(const at::Tensor& picture) const;

  // The picture uint8 [3, 8 h, 8 w] of scaled latents [1, 16, 1, h, w].
  at::Tensor decode(const at::Tensor& latents) const;

  // Target latents [1, 16, 1, h, w] float32 of a condition [1, 16, frames, h, w] whose last frame is the query, from
  // noise of the target's shape and the task's `context_keys`: explicit Euler over the speed's knots, classifier-free
  // guidance; at 1.0 the null branch cancels and does not run. Throws InputError for steps that the artifact has no
  // modulation of.
  at::Tensor sample(const at::Tensor& condition, const at::Tensor& noise, double guidance, const Kept& context,
                    const Progress& progress) const;

 private:
  // One evaluation's modulation.
  struct Rows {
    at::Tensor blocks, head_scale;
  };

  at::Tensor table(const std::string& kind, const std::string& name) const;
  at::Tensor store(const at::Tensor& latents, const at::Tensor& condition, const Rows& rows, Kept& kept) const;
  at::Tensor reuse(const at::Tensor& latents, const at::Tensor& condition, const Rows& rows, const Kept& kept) const;

  Manifest manifest_;
  Speed speed_;
  std::string knots_;  // the name of the speed's table
  at::Device device_;
  std::map<std::string, at::Tensor> modulation_;
  std::unique_ptr<Network> denoiser_, encoder_, decoder_;
};

// Noise [1, 16, 1, height / 8, width / 8] of a seed, on the CPU: the same that Python draws.
at::Tensor draw_noise(uint64_t seed, int64_t height, int64_t width);

}  // namespace lavin
