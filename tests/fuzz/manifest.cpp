#include "artifact.h"
#include "bytes.h"
#include "json.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fuzz(data, size, [](std::string_view text) {
    try {
      lavin::Manifest::parse(text).check_target(at::kCPU);
    } catch (const lavin::InputError&) {
      throw;
    } catch (const lavin::Json::exception& error) {  // `Manifest::read` makes one line of it
      throw lavin::InputError(lavin::reason(error));
    }
  });
}
