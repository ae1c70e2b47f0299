// Safetensors files: 8 bytes with the header's length, the header (JSON), the tensors' bytes.
#pragma once

#include <ATen/ATen.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "files.h"

namespace lavin {

struct Safetensors {
  // Maps a file and checks its header; tensors are views of the mapped bytes, which they keep.
  // Throws InputError: no such file, not such a file, or a truncated one.
  static Safetensors open(const fs::path& path);
  static Safetensors parse(const std::shared_ptr<MappedFile>& file, const fs::path& path);

  // A tensor by name; throws InputError where there is none.
  const at::Tensor& at(const std::string& name) const;

  fs::path path;
  std::map<std::string, at::Tensor> tensors;
  std::map<std::string, std::string> metadata;
};

// Writes one tensor as a safetensors file, whole or not at all.
void save_tensor(const fs::path& path, const std::string& name, const at::Tensor& tensor);

}  // namespace lavin
