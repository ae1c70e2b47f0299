#include "files.h"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "error.h"

namespace lavin {

std::shared_ptr<MappedFile> MappedFile::open(const fs::path& path, const std::string& expected) {
  auto fail = [&](const std::string& reason) -> InputError {
    return InputError("cannot read " + one_line(path.string()) + ": " + reason + "; expected " + expected);
  };
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) throw fail(std::strerror(errno));
  struct stat status {};
  std::shared_ptr<MappedFile> file(new MappedFile);
  std::string reason;
  if (::fstat(descriptor, &status) != 0) {
    reason = std::strerror(errno);
  } else if (!S_ISREG(status.st_mode)) {
    reason = "it is no plain file";
  } else if (status.st_size > 0) {
    void* data = ::mmap(nullptr, status.st_size, PROT_READ, MAP_PRIVATE, descriptor, 0);
    if (data == MAP_FAILED) {
      reason = std::strerror(errno);
    } else {
      file->data_ = static_cast<const char*>(data);
      file->size_ = status.st_size;
    }
  }
  ::close(descriptor);
  if (!reason.empty()) throw fail(reason);
  return file;
}

std::shared_ptr<MappedFile> MappedFile::of(std::string bytes) {
  std::shared_ptr<MappedFile> file(new MappedFile);
  file->held_ = std::move(bytes);
  file->data_ = file->held_.data();
  file->size_ = file->held_.size();
  return file;
}

MappedFile::~MappedFile() {
  if (size_ && held_.empty()) ::munmap(const_cast<char*>(data_), size_);
}

std::string sha256_hex(std::string_view bytes) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned size = 0;
  if (!EVP_Digest(bytes.data(), bytes.size(), digest, &size, EVP_sha256(), nullptr)) {
    throw std::runtime_error("OpenSSL has no SHA-256 here");
  }
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (unsigned i = 0; i < size; ++i) text += {kDigits[digest[i] >> 4], kDigits[digest[i] & 15]};
  return text;
}

namespace {

InputError cannot_write(const fs::path& path, const std::string& reason) {
  return InputError(one_line(path.string()) + ": cannot be written (" + reason + "); choose a place you can write to");
}

fs::path partial_name(const fs::path& path) {
  return path.parent_path() / (".lavin-native-" + std::to_string(::getpid()) + ".part" + path.extension().string());
}

}  // namespace

void written_whole(const fs::path& path, const std::function<void(const fs::path&)>& write) {
  std::error_code error;
  const fs::path target = fs::is_symlink(path, error) ? fs::weakly_canonical(path, error) : path;
  const fs::path partial = partial_name(target);
  try {
    write(partial);
    fs::rename(partial, target);
  } catch (const fs::filesystem_error& failure) {
    fs::remove(partial, error);
    throw cannot_write(path, failure.code().message());
  } catch (...) {
    fs::remove(partial, error);
    throw;
  }
}

void check_writable(const fs::path& path) {
  std::error_code error;
  const fs::path folder = fs::absolute(path).parent_path();
  fs::create_directories(folder, error);
  if (error) throw cannot_write(path, error.message());
  if (fs::is_directory(path, error)) throw cannot_write(path, "it is a folder");
  const fs::path probe = partial_name(fs::absolute(path));
  const int descriptor = ::open(probe.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (descriptor < 0) throw cannot_write(path, std::strerror(errno));
  ::close(descriptor);
  fs::remove(probe, error);
}

}  // namespace lavin
