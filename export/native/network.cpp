#include "network.h"

#include <ATen/Version.h>
#include <sys/utsname.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>

#include "error.h"
#include "files.h"
#include "json.h"
#include "safetensors.h"

namespace lavin {

namespace {

void check_processor(const Part& part, const std::string& file) {
  struct utsname system {};
  ::uname(&system);
  if (part.machine != system.machine) {
    throw InputError(file + " was compiled for " + one_line(part.machine, 40) + " processors, this is " +
                     system.machine + "; export it again");
  }
  static constexpr const char* kLevels[] = {"DEFAULT", "AVX2", "AVX512"};
  const auto rank = [](const std::string& level) {
    return std::find(std::begin(kLevels), std::end(kLevels), level) - kLevels;
  };
  const std::string found = at::get_cpu_capability();
  if (rank(part.cpu_level) < 3 && rank(found) < rank(part.cpu_level)) {
    throw InputError(file + " was compiled for processors with " + part.cpu_level + ", this one has " + found +
                     "; export it on this machine");
  }
}

std::unordered_map<std::string, at::Tensor> read_weights(const fs::path& path, at::Device device) {
  const Safetensors file = Safetensors::open(path);
  const auto permuted = file.metadata.find("permuted");
  const Json orders = parse_json(permuted == file.metadata.end() ? "{}" : permuted->second);
  std::unordered_map<std::string, at::Tensor> weights;
  for (const auto& [name, stored] : file.tensors) {
    at::Tensor tensor = stored.to(device);
    if (orders.contains(name)) tensor = tensor.permute(wholes(orders.at(name)));
    weights.emplace(name, tensor);
  }
  return weights;
}

std::string listed(const std::vector<Dimension>& shape) {
  std::vector<std::string> texts;
  for (const auto& [multiple, name] : shape) {
    const std::string number = name.empty() || multiple > 1 ? std::to_string(multiple) : "";
    texts.push_back(number + (number.empty() || name.empty() ? "" : "*") + name);
  }
  return joined(texts);
}

std::string listed(const Ranges& ranges) {
  std::vector<std::string> texts;
  for (const auto& [name, ends] : ranges) {
    texts.push_back(name + " " + std::to_string(ends.first) + " to " + std::to_string(ends.second));
  }
  return joined(texts);
}

}  // namespace

Network::Network(const Manifest& manifest, const std::string& part, at::Device device)
    : part_(manifest.parts.at(part)), name_(part), device_(device) {
  const fs::path path = manifest.folder / part_.file;
  try {
    check_processor(part_, path.string());
    for (const std::string& file : part_.weights) weights_.merge(read_weights(manifest.folder / file, device));
    const at::DeviceIndex index = device.has_index() ? device.index() : -1;
    loader_ = std::make_unique<torch::inductor::AOTIModelPackageLoader>(
        path.string(), "model", /*run_single_threaded=*/true, /*num_runners=*/1, index);
    std::unordered_map<std::string, at::Tensor> wanted;
    for (const std::string& name : loader_->get_constant_fqns()) {
      auto found = weights_.find(name);
      if (found == weights_.end()) {
        throw InputError(path.string() + ": its weights are not all there, e.g. " + name +
                         " is missing; export the artifact again");
      }
      wanted.insert(*found);
    }
    // The package keeps pointers to these tensors: no second copy, and weights_ holds them.
    loader_->load_constants(wanted, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
  } catch (const InputError&) {
    throw;
  } catch (const std::exception& error) {
    if (const std::string fault = temporary_folder_fault(); !fault.empty()) {
      throw InputError(path.string() + " cannot be loaded by way of " + fault +
                       "; name another one in the environment's TMPDIR");
    }
    const auto* of_torch = dynamic_cast<const c10::Error*>(&error);
    throw InputError(path.string() + " cannot be loaded (" +
                     (of_torch ? one_line(of_torch->what_without_backtrace()) : reason(error)) +
                     "); export it again on this machine");
  }
}

Network::~Network() = default;

void Network::check_shapes(const std::vector<at::Tensor>& inputs) const {
  if (inputs.size() != part_.inputs.size()) throw InputError(name_ + " takes another number of inputs");
  std::map<std::string, int64_t> sizes;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto& [name, dtype, shape] = part_.inputs[i];
    bool fits = static_cast<int64_t>(shape.size()) == inputs[i].dim();
    for (size_t d = 0; fits && d < shape.size(); ++d) {
      const auto& [multiple, size] = shape[d];
      const int64_t found = inputs[i].size(static_cast<int64_t>(d));
      fits = found == multiple * (size.empty() ? 1 : sizes.emplace(size, found / multiple).first->second);
    }
    if (!fits) {
      throw InputError(name_ + ": " + name + " is [" + joined(inputs[i].sizes()) + "]; the artifact takes [" +
                       listed(shape) + "]");
    }
  }
  for (const Ranges& ranges : part_.ranges) {
    const bool fit = std::all_of(ranges.begin(), ranges.end(), [&](const auto& range) {
      auto found = sizes.find(range.first);
      return found == sizes.end() || (range.second.first <= found->second && found->second <= range.second.second);
    });
    if (fit) return;
  }
  std::vector<std::string> found, taken;
  for (const auto& [name, value] : sizes) found.push_back(name + " " + std::to_string(value));
  for (const Ranges& ranges : part_.ranges) taken.push_back(listed(ranges));
  throw InputError(name_ + ": asked for " + joined(found) + " (in latents); the artifact takes " +
                   joined(taken, " or ") + "; export it for these sizes");
}

std::vector<at::Tensor> Network::operator()(std::vector<at::Tensor> inputs) const {
  // Compiled code believes what it is given: another shape or dtype would read memory that is not there.
  check_shapes(inputs);
  for (size_t i = 0; i < inputs.size(); ++i) inputs[i] = inputs[i].to(device_, part_.inputs[i].dtype).contiguous();
  return loader_->boxed_run(std::move(inputs));
}

}  // namespace lavin
