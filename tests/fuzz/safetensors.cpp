#include "bytes.h"
#include "safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fuzz(data, size, [](std::string_view bytes) {
    const auto file = lavin::Safetensors::parse(lavin::MappedFile::of(safetensors(bytes)), "a.safetensors");
    for (const auto& [name, tensor] : file.tensors) {
      // Every byte that a tensor claims is there.
      const auto* values = static_cast<const unsigned char*>(tensor.const_data_ptr());
      unsigned sum = 0;
      for (size_t i = 0; i < tensor.nbytes(); ++i) sum += values[i];
      volatile unsigned kept = sum;
      (void)kept;
    }
  });
}
