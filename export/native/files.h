// Files: mapped to be read, told apart by their hash, written whole or not at all.
#pragma once

#include <cstddef>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace lavin {

namespace fs = std::filesystem;

// A file's bytes, mapped; they go when the last owner does.
class MappedFile {
 public:
  // Throws InputError with `expected` where there is no such file, or it is no plain file.
  static std::shared_ptr<MappedFile> open(const fs::path& path, const std::string& expected);

  // Bytes that are in memory already, as if a file held them.
  static std::shared_ptr<MappedFile> of(std::string bytes);

  MappedFile(const MappedFile&) = delete;
  ~MappedFile();

  const char* data() const { return data_; }
  size_t size() const { return size_; }
  std::string_view text() const { return {data_, size_}; }

 private:
  MappedFile() = default;

  std::string held_;
  const char* data_ = "";
  size_t size_ = 0;
};

// SHA-256 as 64 hexadecimal digits in lower case.
std::string sha256_hex(std::string_view bytes);

// Calls `write` with an empty file beside `path`, then renames that to `path`; removes it where anything fails. A file
// that is there keeps its mode and owner; one that cannot be replaced, and a device, is written over.
void written_whole(const fs::path& path, const std::function<void(const fs::path&)>& write);

// Throws InputError unless `written_whole` can write there; makes nothing.
void check_writable(const fs::path& path);

// What keeps programs in the folder for temporary files from running, with the folder's name; empty where nothing does.
std::string temporary_folder_fault();

}  // namespace lavin
