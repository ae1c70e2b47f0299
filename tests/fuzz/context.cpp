#include "bytes.h"
#include "context.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fuzz(data, size, [](std::string_view bytes) {
    const auto file = lavin::Safetensors::parse(lavin::MappedFile::of(safetensors(bytes)), "a.safetensors");
    lavin::EncodedContext::of(file, "00000000000000000000000000000000");
  });
}
