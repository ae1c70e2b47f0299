#include "safetensors.h"

#include <cstring>
#include <fstream>

#include "error.h"
#include "json.h"

namespace lavin {

namespace {

constexpr uint64_t kMaxHeader = 100'000'000;

const std::map<std::string, at::ScalarType> kDtypes{
    {"F32", at::kFloat}, {"BF16", at::kBFloat16}, {"F16", at::kHalf}, {"F64", at::kDouble},
    {"I64", at::kLong},  {"I32", at::kInt},       {"U8", at::kByte},  {"BOOL", at::kBool},
};

at::Tensor read_tensor(const Json& entry, const std::shared_ptr<MappedFile>& file, uint64_t start) {
  const auto name = entry.at("dtype").get<std::string>();
  const auto known = kDtypes.find(name);
  if (known == kDtypes.end()) throw InputError("it has a tensor of the unknown dtype " + one_line(name, 20));
  const at::ScalarType dtype = known->second;
  const std::vector<int64_t> shape = wholes(entry.at("shape")), offsets = wholes(entry.at("data_offsets"));
  uint64_t bytes = c10::elementSize(dtype);
  for (const int64_t size : shape) {
    if (size < 0 || __builtin_mul_overflow(bytes, static_cast<uint64_t>(size), &bytes)) {
      throw InputError("it has a tensor of an impossible shape");
    }
  }
  if (offsets.size() != 2 || offsets[0] < 0 || offsets[1] < offsets[0] || uint64_t(offsets[1] - offsets[0]) != bytes) {
    throw InputError("it has a tensor whose bytes do not make its shape");
  }
  if (uint64_t(offsets[1]) > file->size() - start) throw InputError("it is truncated");
  if (bytes == 0) return at::empty(shape, dtype);
  // Nothing writes into a package's constants; the pages are mapped to be read only.
  void* data = const_cast<char*>(file->data()) + start + offsets[0];
  if (reinterpret_cast<uintptr_t>(data) % c10::elementSize(dtype)) {
    throw InputError("it has a tensor that is not aligned");
  }
  const auto keep = [file](void*) {};
  return at::from_blob(data, shape, keep, dtype);
}

}  // namespace

Safetensors Safetensors::open(const fs::path& path) {
  return parse(MappedFile::open(path, "a safetensors file"), path);
}

Safetensors Safetensors::parse(const std::shared_ptr<MappedFile>& file, const fs::path& path) {
  Safetensors result;
  result.path = path;
  try {
    uint64_t length = 0;
    if (file->size() >= 8) std::memcpy(&length, file->data(), 8);
    if (file->size() < 8 || length > kMaxHeader) throw InputError("its first bytes are no header");
    if (length > file->size() - 8) throw InputError("it is truncated");
    const auto header = parse_json({file->data() + 8, length}).get<std::map<std::string, Json>>();
    for (const auto& [name, entry] : header) {
      if (name == "__metadata__") {
        entry.get_to(result.metadata);
      } else {
        result.tensors[name] = read_tensor(entry, file, 8 + length);
      }
    }
  } catch (const std::exception& error) {
    throw InputError(one_line(path.string()) + " is not a sound safetensors file (" + reason(error) +
                     "); fetch or write it again");
  }
  return result;
}

const at::Tensor& Safetensors::at(const std::string& name) const {
  auto found = tensors.find(name);
  if (found == tensors.end()) {
    throw InputError(one_line(path.string()) + " has no tensor " + one_line(name) + "; expected one of that name");
  }
  return found->second;
}

void save_tensor(const fs::path& path, const std::string& name, const at::Tensor& tensor) {
  const at::Tensor values = tensor.detach().to(at::kCPU, at::kFloat).contiguous();
  Json described;
  described[name] = {{"dtype", "F32"}, {"shape", values.sizes().vec()}, {"data_offsets", {0, values.nbytes()}}};
  std::string header = described.dump();
  header.resize((header.size() + 7) / 8 * 8, ' ');
  written_whole(path, [&](const fs::path& partial) {
    std::ofstream out(partial, std::ios::binary);
    const uint64_t length = header.size();
    out.write(reinterpret_cast<const char*>(&length), 8);
    out << header;
    out.write(static_cast<const char*>(values.const_data_ptr()), static_cast<std::streamsize>(values.nbytes()));
    out.flush();
    if (!out) throw InputError(one_line(path.string()) + ": cannot be written; is the disk full?");
  });
}

}  // namespace lavin
