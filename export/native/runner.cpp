#include "runner.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>

#include "error.h"
#include "pictures.h"
#include "safetensors.h"

namespace lavin {

namespace {

// The manifest of an artifact whose files are those that were exported, and which serves the speed.
Manifest checked(const fs::path& folder, at::Device device, const std::string& name, std::optional<int64_t> steps) {
  Manifest manifest = Manifest::read(folder);
  if (steps && manifest.speed(name).owns_grid()) {
    throw InputError("speed " + name + " has a grid of its own, --steps is " + std::to_string(*steps) +
                     "; leave one of them out");
  }
  manifest.check_target(device);
  if (device.is_cuda()) {
    // float32 means float32: no TF32, which cuDNN's convolutions take unless told otherwise.
    at::globalContext().setAllowTF32CuDNN(false);
    at::globalContext().setAllowTF32CuBLAS(false);
  }
  manifest.check_files();
  return manifest;
}

// The knots that a speed's own grid means, as Python rounds them.
at::Tensor own_knots(const Speed& speed) {
  if (speed.times) return at::tensor(*speed.times, at::kDouble).to(at::kFloat);
  return at::linspace(0, 1, speed.count() + 1, at::kDouble).to(at::kFloat);
}

}  // namespace

Runner::Runner(const fs::path& folder, at::Device device, const std::string& speed, std::optional<int64_t> steps)
    : manifest_(checked(folder, device, speed, steps)),
      speed_(manifest_.speed(speed)),
      knots_(speed_.owns_grid() ? "speed." + speed : std::to_string(steps.value_or(20))),
      device_(device),
      modulation_(Safetensors::open(folder / "modulation.safetensors").tensors),
      denoiser_(std::make_unique<Network>(manifest_, speed_.keeps() ? kKeptDenoiser : kDenoiser, device)),
      encoder_(std::make_unique<Network>(manifest_, "vae_encoder", device)),
      decoder_(std::make_unique<Network>(manifest_, "vae_decoder", device)) {}

at::Tensor Runner::encode(const at::Tensor& picture) const {
  const at::Tensor mean = (*encoder_)({to_pixels(picture)}).at(0);
  return (mean.to(at::kFloat) - manifest_.latent_shift) * manifest_.latent_scale;
}

at::Tensor Runner::decode(const at::Tensor& latents) const {
  return from_pixels((*decoder_)({latents / manifest_.latent_scale + manifest_.latent_shift}).at(0));
}

at::Tensor Runner::table(const std::string& kind, const std::string& name) const {
  const auto found = modulation_.find(kind + "." + name);
  if (found != modulation_.end()) return found->second;
  if (speed_.owns_grid() || name != knots_) {
    throw InputError("modulation.safetensors lacks " + kind + "." + name + "; export the artifact again");
  }
  throw InputError("steps is " + name + "; the artifact has the schedules of " + joined(manifest_.schedules) +
                   "; choose one or export with --steps " + name);
}

// The velocity; the keys and values of the condition's frames but the last one, the query, are kept.
at::Tensor Runner::store(const at::Tensor& latents, const at::Tensor& condition, const Rows& rows, Kept& kept) const {
  const auto& shape = manifest_.parts.at(kKeptDenoiser).inputs[kKeys].shape;
  const at::Tensor none = at::empty({shape[0].multiple, 1, 0, latents.size(3) / 2, latents.size(4) / 2,
                                     shape[5].multiple});
  const auto found = (*denoiser_)({latents, condition, rows.blocks, rows.head_scale, none, none});
  const int64_t frames = condition.size(2) - 1;
  kept = {found.at(1).narrow(2, 0, frames).contiguous(), found.at(2).narrow(2, 0, frames).contiguous()};
  return found.at(0);
}

// The velocity of the query and target, the frames before them being given by their keys and values.
at::Tensor Runner::reuse(const at::Tensor& latents, const at::Tensor& condition, const Rows& rows,
                         const Kept& kept) const {
  const at::Tensor query = condition.slice(2, -1);
  return (*denoiser_)({latents, query, rows.blocks, rows.head_scale, kept.keys, kept.values}).at(0);
}

Kept Runner::context_keys(const at::Tensor& context) const {
  Kept kept;
  if (!speed_.once_a_task) return kept;
  const at::Tensor frames = context.to(device_, at::kFloat), zeros = at::zeros_like(frames.slice(2, 0, 1));
  const Rows rows{table("blocks", "context").to(device_)[0], table("head_scale", "context").to(device_)[0]};
  store(zeros, at::cat({frames, zeros}, 2), rows, kept);
  return kept;
}

at::Tensor Runner::sample(const at::Tensor& condition, const at::Tensor& noise, double guidance, const Kept& context,
                          const Progress& progress) const {
  const at::Tensor knots = table("knots", knots_).to(at::kFloat);
  const at::Tensor blocks = table("blocks", knots_).to(device_), head_scale = table("head_scale", knots_).to(device_);
  const at::Tensor cond = condition.to(device_, at::kFloat);
  const at::Tensor query = cond.slice(2, -1);
  const at::Tensor null = at::cat({at::zeros_like(query), query}, 2);
  at::Tensor latents = noise.to(device_, at::kFloat), difference;
  const int64_t evaluations = knots.numel() - 1;
  const bool other = speed_.owns_grid() && !at::equal(knots, own_knots(speed_));
  if (other || blocks.size(0) != evaluations || head_scale.size(0) != evaluations) {
    throw InputError("modulation.safetensors contradicts itself or the manifest; export the artifact again");
  }
  speed_.check_sets(evaluations);
  Kept of_cond = context, of_null;
  for (int64_t i = 0; i < evaluations; ++i) {
    const Rows rows{blocks[i], head_scale[i]};
    const auto velocity_for = [&](const at::Tensor& of, Kept& kept, bool refresh) {
      at::Tensor velocity;
      if (!speed_.keeps()) {
        velocity = (*denoiser_)({latents, of, rows.blocks, rows.head_scale}).at(0);
      } else {
        velocity = refresh ? store(latents, of, rows, kept) : reuse(latents, of, rows, kept);
      }
      return velocity.to(at::kFloat);
    };
    const bool refresh = speed_.refresh && speed_.refresh->count(i) > 0;
    at::Tensor velocity = velocity_for(cond, of_cond, refresh);
    if (guidance != 1.0 && (!speed_.guided || speed_.guided->count(i) > 0)) {
      const at::Tensor free = velocity_for(null, of_null, refresh || (speed_.once_a_task && i == 0));
      difference = velocity - free;
      velocity = free + guidance * difference;
    } else if (guidance != 1.0) {
      velocity = velocity + (guidance - 1) * difference;
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
