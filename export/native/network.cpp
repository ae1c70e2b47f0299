#include "network.h"

#include <ATen/Version.h>
#include <sys/utsname.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <charconv>

#include "error.h"
#include "safetensors.h"

namespace lavin {

namespace {

void check_processor(const Json& part, const std::string& file) {
  struct utsname system {};
  ::uname(&system);
  const Json* machine = part.find("machine");
  if (!machine || machine->string() != system.machine) {
    throw InputError(file + " was compiled for " + (machine ? one_line(machine->string(), 40) : "other") +
                     " processors, this is " + system.machine + "; export it again");
  }
  static constexpr const char* kLevels[] = {"DEFAULT", "AVX2", "AVX512"};
  const auto rank = [](const std::string& level) {
    return std::find(std::begin(kLevels), std::end(kLevels), level) - kLevels;
  };
  const std::string found = at::get_cpu_capability(), wanted = part["cpu_level"].string();
  if (rank(wanted) < 3 && rank(found) < rank(wanted)) {
    throw InputError(file + " was compiled for processors with " + wanted + ", this one has " + found +
                     "; export it on this machine");
  }
}

std::unordered_map<std::string, at::Tensor> read_weights(const fs::path& path, at::Device device) {
  const Safetensors file = Safetensors::open(path);
  const auto permuted = file.metadata.find("permuted");
  const Json orders = Json::parse(permuted == file.metadata.end() ? "{}" : permuted->second);
  std::unordered_map<std::string, at::Tensor> weights;
  for (const auto& [name, stored] : file.tensors) {
    at::Tensor tensor = stored.to(device);
    if (const Json* order = orders.find(name)) {
      std::vector<int64_t> dims;
      for (const Json& dim : order->array()) dims.push_back(dim.integer());
      tensor = tensor.permute(dims);
    }
    weights.emplace(name, tensor);
  }
  return weights;
}

struct Size {
  int64_t multiple;
  std::string name;
};

// "rows" and "8*rows".
Size parse_size(const std::string& text) {
  const size_t star = text.find('*');
  if (star == std::string::npos) return {1, text};
  int64_t multiple = 0;
  std::from_chars(text.data(), text.data() + star, multiple);
  if (multiple < 1) throw InputError("a shape has " + one_line(text, 40));
  return {multiple, text.substr(star + 1)};
}

std::string listed(const std::vector<Json>& shape) {
  std::string text;
  for (const Json& item : shape) {
    text += (text.empty() ? "" : ", ") + (item.is_integer() ? std::to_string(item.integer()) : item.string());
  }
  return "[" + text + "]";
}

std::string listed(at::IntArrayRef shape) { return "[" + joined(shape) + "]"; }

std::string listed(const std::map<std::string, Json>& ranges) {
  std::string text;
  for (const auto& [name, bounds] : ranges) {
    text += (text.empty() ? "" : ", ") + name + " " + std::to_string(bounds.array().at(0).integer()) + " to " +
            std::to_string(bounds.array().at(1).integer());
  }
  return text;
}

}  // namespace

Network::Network(const Manifest& manifest, const std::string& part, at::Device device)
    : part_(manifest.values["parts"][part]), name_(part), device_(device) {
  const fs::path path = manifest.folder / part_["file"].string();
  try {
    check_processor(part_, path.string());
    for (const Json& input : part_["inputs"].array()) dtypes_.push_back(scalar_type(input["dtype"].string()));
    for (const Json& file : part_["weights"].array()) {
      weights_.merge(read_weights(manifest.folder / file.string(), device));
    }
    loader_ = std::make_unique<torch::inductor::AOTIModelPackageLoader>(path.string(), "model",
                                                                        /*run_single_threaded=*/true, /*num_runners=*/1,
                                                                        device.has_index() ? device.index() : -1);
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
  } catch (const c10::Error& error) {
    throw InputError(path.string() + " cannot be loaded (" + one_line(error.what_without_backtrace()) +
                     "); export it again on this machine");
  } catch (const std::exception& error) {
    throw InputError(path.string() + " cannot be loaded (" + one_line(error.what()) +
                     "); export it again on this machine");
  }
}

Network::~Network() = default;

void Network::check_shapes(const std::vector<at::Tensor>& inputs) const {
  const auto& described = part_["inputs"].array();
  if (inputs.size() != described.size()) {
    throw InputError(name_ + ": " + std::to_string(inputs.size()) + " inputs given");
  }
  std::map<std::string, int64_t> sizes;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto& shape = described[i]["shape"].array();
    bool fits = static_cast<int64_t>(shape.size()) == inputs[i].dim();
    for (size_t d = 0; fits && d < shape.size(); ++d) {
      const int64_t found = inputs[i].size(static_cast<int64_t>(d));
      if (shape[d].is_integer()) {
        fits = shape[d].integer() == found;
        continue;
      }
      const Size size = parse_size(shape[d].string());
      const int64_t value = sizes.emplace(size.name, found / size.multiple).first->second;
      fits = found % size.multiple == 0 && value == found / size.multiple;
    }
    if (!fits) {
      throw InputError(name_ + ": " + described[i]["name"].string() + " is " + listed(inputs[i].sizes()) +
                       "; the artifact takes " + listed(shape));
    }
  }
  const Json& ranges = part_["ranges"];
  const std::vector<Json> alternatives = ranges.is_array() ? ranges.array() : std::vector<Json>{ranges};
  for (const Json& one : alternatives) {
    bool fits = true;
    for (const auto& [name, bounds] : one.object()) {
      auto found = sizes.find(name);
      const auto& pair = bounds.array();
      if (pair.size() != 2) throw InputError(name_ + ": its manifest has a range without two ends; export it again");
      fits &= found == sizes.end() || (pair[0].integer() <= found->second && found->second <= pair[1].integer());
    }
    if (fits) return;
  }
  std::string found;
  for (const auto& [name, value] : sizes) found += (found.empty() ? "" : ", ") + name + " " + std::to_string(value);
  throw InputError(name_ + ": asked for " + found + " (in latents); the artifact takes " +
                   listed(alternatives.at(0).object()) + "; export it for these sizes");
}

std::vector<at::Tensor> Network::operator()(std::vector<at::Tensor> inputs) const {
  // Compiled code believes what it is given: another shape or dtype would read memory that is not there.
  check_shapes(inputs);
  for (size_t i = 0; i < inputs.size(); ++i) inputs[i] = inputs[i].to(device_, dtypes_[i]).contiguous();
  return loader_->boxed_run(std::move(inputs));
}

}  // namespace lavin
