#include "runner.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>

#include "error.h"
#include "pictures.h"
#include "safetensors.h"

namespace lavin {

namespace {

Manifest checked(const fs::path& folder, at::Device device) {
  Manifest manifest = Manifest::read(folder);
  manifest.check_target(device);
  if (device.is_cuda()) {
    // float32 means float32: no TF32, which cuDNN's convolutions take unless told otherwise.
    at::globalContext().setAllowTF32CuDNN(false);
    at::globalContext().setAllowTF32CuBLAS(false);
  }
  manifest.check_files();
  return manifest;
}

}  // namespace

Runner::Runner(const fs::path& folder, at::Device device)
    : manifest_(checked(folder, device)),
      device_(device),
      modulation_(Safetensors::open(folder / "modulation.safetensors").tensors),
      denoiser_(std::make_unique<Network>(manifest_, "denoiser", device)),
      encoder_(std::make_unique<Network>(manifest_, "vae_encoder", device)),
      decoder_(std::make_unique<Network>(manifest_, "vae_decoder", device)) {}

at::Tensor Runner::encode(const at::Tensor& picture) const {
  const at::Tensor mean = (*encoder_)({to_pixels(picture)}).at(0);
  return (mean.to(at::kFloat) - manifest_.latent_shift) * manifest_.latent_scale;
}

at::Tensor Runner::decode(const at::Tensor& latents) const {
  return from_pixels((*decoder_)({latents / manifest_.latent_scale + manifest_.latent_shift}).at(0));
}

at::Tensor Runner::sample(const at::Tensor& condition, const at::Tensor& noise, int64_t steps, double guidance,
                          const Progress& progress) const {
  const auto table = [&](const char* name) {
    auto found = modulation_.find(name + std::to_string(steps));
    if (found == modulation_.end()) {
      throw InputError("steps is " + std::to_string(steps) + "; the artifact has the schedules of " +
                       joined(manifest_.schedules) + "; choose one or export with --steps " + std::to_string(steps));
    }
    return found->second;
  };
  const at::Tensor knots = table("knots.").to(at::kFloat);
  const at::Tensor blocks = table("blocks.").to(device_), head_scale = table("head_scale.").to(device_);
  const at::Tensor cond = condition.to(device_, at::kFloat);
  const at::Tensor query = cond.slice(2, -1);
  const at::Tensor null = at::cat({at::zeros_like(query), query}, 2);
  at::Tensor latents = noise.to(device_, at::kFloat);
  const int64_t evaluations = knots.numel() - 1;
  if (blocks.size(0) != evaluations || head_scale.size(0) != evaluations) {
    throw InputError("modulation.safetensors contradicts itself; export the artifact again");
  }
  for (int64_t i = 0; i < evaluations; ++i) {
    const auto velocity_for = [&](const at::Tensor& of) {
      return (*denoiser_)({latents, of, blocks[i], head_scale[i]}).at(0).to(at::kFloat);
    };
    at::Tensor velocity = velocity_for(cond);
    if (guidance != 1.0) {
      const at::Tensor free = velocity_for(null);
      velocity = free + guidance * (velocity - free);
    }
    const float step = (knots[i + 1] - knots[i]).item<float>();
    latents = at::add(latents, velocity, step);
    if (!latents.isfinite().all().item<bool>()) {
      throw std::runtime_error("latents became NaN or infinite in step " + std::to_string(i + 1) + " of " +
                               std::to_string(evaluations) + "; check the weights, or export in float32");
    }
    progress(i + 1, evaluations);
  }
  return latents;
}

at::Tensor draw_noise(uint64_t seed, int64_t height, int64_t width) {
  return at::randn({1, 16, 1, height / 8, width / 8}, at::detail::createCPUGenerator(seed), at::kFloat);
}

}  // namespace lavin
