// The whole way from pictures to a picture, on an artifact.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <vector>

#include "network.h"

namespace lavin {

// (evaluations done, evaluations in all)
using Progress = std::function<void(int64_t, int64_t)>;

class Runner {
 public:
  // Checks an artifact's files and loads its networks. Throws InputError for whatever cannot be used.
  Runner(const fs::path& folder, at::Device device);

  const Manifest& manifest() const { return manifest_; }

  // Scaled latents [1, 16, 1, H / 8, W / 8] float32 of a picture uint8 [3, H, W]: the posterior's mean.
  at::Tensor encode(const at::Tensor& picture) const;

  // The picture uint8 [3, 8 h, 8 w] of scaled latents [1, 16, 1, h, w].
  at::Tensor decode(const at::Tensor& latents) const;

  // Target latents [1, 16, 1, h, w] float32 of a condition [1, 16, frames, h, w] whose last frame is the query, from
  // noise of the target's shape: explicit Euler over `steps` knots, classifier-free guidance; at 1.0 the null branch
  // cancels and does not run. Throws InputError for steps that the artifact has no modulation of.
  at::Tensor sample(const at::Tensor& condition, const at::Tensor& noise, int64_t steps, double guidance,
                    const Progress& progress) const;

 private:
  Manifest manifest_;
  at::Device device_;
  std::map<std::string, at::Tensor> modulation_;
  std::unique_ptr<Network> denoiser_, encoder_, decoder_;
};

// Noise [1, 16, 1, height / 8, width / 8] of a seed, on the CPU: the same that Python draws.
at::Tensor draw_noise(uint64_t seed, int64_t height, int64_t width);

}  // namespace lavin
