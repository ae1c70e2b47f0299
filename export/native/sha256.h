// SHA-256 (FIPS 180-4), with the processor's own instructions where it has them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace lavin {

// The digest of `size` bytes.
std::array<uint8_t, 32> sha256(const void* data, size_t size);

// The same as 64 hexadecimal digits.
std::string sha256_hex(const void* data, size_t size);

}  // namespace lavin
