#include "safetensors.h"

#include <cstring>
#include <fstream>

#include "error.h"
#include "json.h"

namespace lavin {

namespace {

constexpr uint64_t kMaxHeader = 100'000'000;

struct Dtype {
  const char* name;
  at::ScalarType type;
};
constexpr Dtype kDtypes[] = {
    {"F32", at::kFloat}, {"BF16", at::kBFloat16}, {"F16", at::kHalf}, {"F64", at::kDouble},
    {"I64", at::kLong},  {"I32", at::kInt},       {"U8", at::kByte},  {"BOOL", at::kBool},
};

at::Tensor read_tensor(const Json& entry, const std::shared_ptr<MappedFile>& file, uint64_t start) {
  const Dtype* dtype = nullptr;
  for (const Dtype& known : kDtypes) {
    if (entry["dtype"].string() == known.name) dtype = &known;
  }
  if (!dtype) throw InputError("it has a tensor of the unknown dtype " + one_line(entry["dtype"].string(), 20));
  const uint64_t available = file->size() - start;
  uint64_t bytes = c10::elementSize(dtype->type);
  std::vector<int64_t> shape;
  for (const Json& item : entry["shape"].array()) {
    const int64_t size = item.integer();
    if (size < 0 || __builtin_mul_overflow(bytes, static_cast<uint64_t>(size), &bytes)) {
      throw InputError("it has a tensor of an impossible shape");
    }
    shape.push_back(size);
  }
  const auto& offsets = entry["data_offsets"].array();
  const int64_t first = offsets.size() == 2 ? offsets[0].integer() : -1, last = first < 0 ? -1 : offsets[1].integer();
  if (first < 0 || last < first || static_cast<uint64_t>(last - first) != bytes) {
    throw InputError("it has a tensor whose bytes do not make its shape");
  }
  if (static_cast<uint64_t>(last) > available) throw InputError("it is truncated");
  if (bytes == 0) return at::empty(shape, dtype->type);
  // Nothing writes into a package's constants; the pages are mapped to be read only.
  void* data = const_cast<char*>(file->data()) + start + first;
  if (reinterpret_cast<uintptr_t>(data) % c10::elementSize(dtype->type)) {
    throw InputError("it has a tensor that is not aligned");
  }
  return at::from_blob(
      data, shape, [file](void*) {}, at::TensorOptions().dtype(dtype->type));
}

}  // namespace

Safetensors Safetensors::open(const fs::path& path) {
  Safetensors result;
  result.path = path;
  auto file = MappedFile::open(path, "a safetensors file");
  try {
    uint64_t length = 0;
    if (file->size() >= 8) std::memcpy(&length, file->data(), 8);
    if (file->size() < 8 || length > kMaxHeader) throw InputError("its first bytes are no header");
    if (length > file->size() - 8) throw InputError("it is truncated");
    const Json header = Json::parse({file->data() + 8, length});
    for (const auto& [name, entry] : header.object()) {
      if (name == "__metadata__") {
        for (const auto& [key, value] : entry.object()) result.metadata[key] = value.string();
      } else {
        result.tensors[name] = read_tensor(entry, file, 8 + length);
      }
    }
  } catch (const InputError& error) {
    throw InputError(one_line(path.string()) + " is not a sound safetensors file (" + error.what() +
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
  std::string header = "{\"" + name + "\":{\"dtype\":\"F32\",\"shape\":[" + joined(values.sizes()) +
                       "],\"data_offsets\":[0," + std::to_string(values.nbytes()) + "]}}";
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
