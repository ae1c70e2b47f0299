#include "files.h"

#include <fcntl.h>
#include <openssl/evp.h>
#include <limits.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <iomanip>
#include <random>
#include <sstream>

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

// A file beside its place that is not ready: new, hidden, and locked while this process has it, so that what a killed one
// left is known by its lock being free.
class Partial {
 public:
  explicit Partial(const fs::path& folder) {
    reclaim(folder);
    std::random_device random;
    do {
      std::ostringstream name;
      name << ".lavin-rt-" << std::hex << std::setfill('0') << std::setw(8) << random() << std::setw(4)
           << (random() & 0xffff) << ".part";
      path = folder / name.str();
      descriptor_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    } while (descriptor_ < 0 && errno == EEXIST);
    if (descriptor_ < 0) throw fs::filesystem_error("", path, std::error_code(errno, std::generic_category()));
    ::flock(descriptor_, LOCK_EX | LOCK_NB);
  }

  Partial(const Partial&) = delete;

  ~Partial() {
    ::unlink(path.c_str());
    ::close(descriptor_);
  }

  fs::path path;

 private:
  static void reclaim(const fs::path& folder) {
    std::error_code error;
    for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
      const std::string name = entry->path().filename().string();
      std::error_code ignored;
      if (!name.starts_with(".lavin-rt-") || !name.ends_with(".part") || !entry->is_regular_file(ignored)) continue;
      const int descriptor = ::open(entry->path().c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
      if (descriptor < 0) continue;
      if (::flock(descriptor, LOCK_EX | LOCK_NB) == 0) ::unlink(entry->path().c_str());
      ::close(descriptor);
    }
  }

  int descriptor_ = -1;
};

// Copies into a file that is there, whose room is taken before anything of it is lost; into a device as it is.
void write_over(const fs::path& partial, const fs::path& target, bool plain) {
  const auto fail = [&target](int code) {
    throw fs::filesystem_error("", target, std::error_code(code, std::generic_category()));
  };
  const auto source = MappedFile::open(partial, "a file");
  const int descriptor = ::open(target.c_str(), O_WRONLY | O_CLOEXEC);
  if (descriptor < 0) fail(errno);
  struct stat before {};
  ::fstat(descriptor, &before);
  int code = plain && source->size() ? ::posix_fallocate(descriptor, 0, static_cast<off_t>(source->size())) : 0;
  if (code == ENOSPC && ::ftruncate(descriptor, before.st_size) != 0) code = errno;
  if (code == EINVAL || code == EOPNOTSUPP) code = 0;
  for (size_t done = 0; code == 0 && done < source->size();) {
    const ssize_t count = ::write(descriptor, source->data() + done, source->size() - done);
    if (count < 0 && errno != EINTR) code = errno;
    if (count > 0) done += static_cast<size_t>(count);
  }
  if (code == 0 && plain && ::ftruncate(descriptor, static_cast<off_t>(source->size())) != 0) code = errno;
  if (::close(descriptor) != 0 && code == 0) code = errno;
  if (code) fail(code);
}

// Renames over a file, whose mode and owner it takes; false where that cannot be.
bool replace(const fs::path& partial, const fs::path& target, const struct stat& old) {
  if (::chown(partial.c_str(), old.st_uid, old.st_gid) != 0) return false;
  if (::chmod(partial.c_str(), old.st_mode & 07777) != 0) return false;
  return ::rename(partial.c_str(), target.c_str()) == 0;
}

}  // namespace

void written_whole(const fs::path& path, const std::function<void(const fs::path&)>& write) {
  try {
    struct stat old {};
    const bool there = ::stat(path.c_str(), &old) == 0;
    const bool plain = !there || S_ISREG(old.st_mode);
    const fs::path target = fs::weakly_canonical(fs::absolute(path));  // writing through a link keeps the link
    fs::path folder = target.parent_path();
    if (there && (!plain || ::access(folder.c_str(), W_OK | X_OK) != 0)) folder = fs::temp_directory_path();
    fs::create_directories(folder);
    const Partial partial(folder);
    write(partial.path);
    if (!there) {
      fs::rename(partial.path, target);
    } else if (!plain || !replace(partial.path, target, old)) {
      write_over(partial.path, plain ? target : path, plain);
    }
  } catch (const fs::filesystem_error& failure) {
    throw cannot_write(path, failure.code().message());
  }
}

void check_writable(const fs::path& path) {
  struct stat old {};
  if (::stat(path.c_str(), &old) == 0) {
    if (S_ISDIR(old.st_mode)) throw cannot_write(path, "it is a folder");
    if (::access(path.c_str(), W_OK) != 0) throw cannot_write(path, std::strerror(errno));
    return;
  }
  if (errno != ENOENT) throw cannot_write(path, std::strerror(errno));
  std::error_code error;
  fs::path folder = fs::absolute(path).parent_path();
  while (!fs::exists(folder, error) && folder.has_relative_path()) folder = folder.parent_path();
  if (fs::absolute(path).filename().string().size() > NAME_MAX) throw cannot_write(path, std::strerror(ENAMETOOLONG));
  try {
    const Partial probe(folder);
  } catch (const fs::filesystem_error& failure) {
    throw cannot_write(path, failure.code().message());
  }
}

std::string temporary_folder_fault() {
  fs::path folder;
  std::string reason;
  struct statvfs status {};
  try {
    folder = fs::temp_directory_path();  // where torch unpacks compiled code
    const Partial probe(folder);
    if (::statvfs(folder.c_str(), &status) == 0) {
      if (status.f_flag & ST_NOEXEC) reason = "programs may not run there (noexec)";
      if (status.f_bavail < 16) reason = std::strerror(ENOSPC);
    }
  } catch (const fs::filesystem_error& failure) {
    if (folder.empty()) folder = failure.path1();
    reason = failure.code().message();
  }
  return reason.empty() ? "" : "the temporary folder " + one_line(folder.string()) + ": " + reason;
}

}  // namespace lavin
