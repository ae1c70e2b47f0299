// A network compiled by AOTInductor, with its weights.
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "artifact.h"

namespace torch::inductor {
class AOTIModelPackageLoader;
}

namespace lavin {

class Network {
 public:
  // Loads a part of an artifact whose files were checked. On a CPU the weights are the mapped file itself. A package
  // that runs without its weights crashes the process: there is no Network without them.
  // Throws InputError: another processor, weights that are not the package's, or a package that cannot be loaded.
  Network(const Manifest& manifest, const std::string& part, at::Device device);
  ~Network();
  Network(const Network&) = delete;

  // The outputs for inputs in the manifest's order, cast to its dtypes.
  // Throws InputError for shapes that it was not exported for.
  std::vector<at::Tensor> operator()(std::vector<at::Tensor> inputs) const;

 private:
  void check_shapes(const std::vector<at::Tensor>& inputs) const;

  const Part& part_;
  std::string name_;
  at::Device device_;
  std::unordered_map<std::string, at::Tensor> weights_;
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> loader_;
};

}  // namespace lavin
