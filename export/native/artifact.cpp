#include "artifact.h"

#include <ATen/DynamicLibrary.h>
#include <sys/stat.h>
#include <torch/version.h>

#include <future>

#include "error.h"

namespace lavin {

namespace {

constexpr char kManifest[] = "manifest.json";
constexpr size_t kMaxBytes = 16 << 20;

bool plain_name(const std::string& name) {
  static constexpr char kKnown[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
  return !name.empty() && name.size() <= 200 && std::isalnum(static_cast<unsigned char>(name[0])) &&
         name != kManifest && name.find_first_not_of(kKnown) == std::string::npos;
}

void check_file(const fs::path& path, int64_t size) {
  struct stat status {};
  if (::lstat(path.c_str(), &status) != 0) {
    throw InputError(path.string() + ": no such file; the artifact is not complete, export or fetch it again");
  }
  if (!S_ISREG(status.st_mode)) {
    throw InputError(path.string() + " is no plain file; an artifact holds neither links nor devices: copy the file");
  }
  if (status.st_size != size) {
    throw InputError(path.string() + " has " + std::to_string(status.st_size) + " bytes, the manifest says " +
                     std::to_string(size) + "; export or fetch the artifact again");
  }
}

// "2.13" of "2.13.0+cpu".
std::string release(const std::string& version) {
  const size_t first = version.find('.');
  return first == std::string::npos ? version : version.substr(0, version.find_first_of(".+", first + 1));
}

// (major, minor) as the driver tells it; the headers of CUDA are not needed to build this.
std::pair<int, int> compute_capability(at::Device device) {
  int handle = 0, major = 0, minor = 0;
  try {
    at::DynamicLibrary driver("libcuda.so.1", nullptr, /*leak_handle=*/true);
    const auto initialise = reinterpret_cast<int (*)(unsigned)>(driver.sym("cuInit"));
    const auto get = reinterpret_cast<int (*)(int*, int)>(driver.sym("cuDeviceGet"));
    const auto attribute = reinterpret_cast<int (*)(int*, int, int)>(driver.sym("cuDeviceGetAttribute"));
    if (!initialise(0) && !get(&handle, device.has_index() ? device.index() : 0) && !attribute(&major, 75, handle) &&
        !attribute(&minor, 76, handle)) {
      return {major, minor};
    }
  } catch (const std::exception&) {  // no such library
  }
  throw InputError("the compute capability of " + device.str() + " cannot be read; is there a GPU, and its driver?");
}

}  // namespace

at::ScalarType scalar_type(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "float16") return at::kHalf;
  throw InputError("dtype is " + one_line(name, 40) + ", expected float32, float16 or bfloat16");
}

Manifest Manifest::read(const fs::path& folder) {
  Manifest manifest;
  manifest.folder = folder;
  const fs::path path = folder / kManifest;
  std::error_code error;
  if (fs::is_symlink(path, error)) {
    throw InputError(path.string() + " is a link; an artifact holds none: copy the file");
  }
  auto file = MappedFile::open(path, "the manifest of an artifact");
  if (file->size() > kMaxBytes) {
    throw InputError(path.string() + " is too large for a manifest; export the artifact again");
  }
  try {
    manifest.values = Json::parse(file->text());
    const Json& values = manifest.values;
    if (!values.find("format") || !values["format"].is_string() || values["format"].string() != "lavin-rt artifact") {
      throw InputError("it is not of a lavin-rt artifact");
    }
    if (!values["version"].is_integer() || values["version"].integer() != 1) {
      throw InputError("its version is another one than 1, which this program reads");
    }
    const std::string& kind = values["kind"].string();
    if (kind != "aoti") throw InputError("it is of kind " + one_line(kind, 40) + ", this program runs aoti");
    manifest.dtype = scalar_type(values["dtype"].string());
    manifest.vae_fingerprint = values["vae_fingerprint"].string();
    manifest.latent_shift = values["latent_scaling"]["shift"].number();
    manifest.latent_scale = values["latent_scaling"]["scale"].number();
    manifest.size = values["size"].integer();
    if (manifest.size < 16 || manifest.size % 16 != 0) {
      throw InputError("its size is " + std::to_string(manifest.size) + ", no positive multiple of 16");
    }
    for (const Json& steps : values["schedules"].array()) manifest.schedules.push_back(steps.integer());
    const auto& files = values["files"].object();
    for (const auto& [name, entry] : files) {
      if (!plain_name(name)) throw InputError("the file name " + one_line(name, 60) + " is no plain one");
      if (entry["bytes"].integer() < 0 || entry["sha256"].string().size() != 64) {
        throw InputError("the entry of " + name + " has no size and hash");
      }
    }
    for (const auto& [name, part] : values["parts"].object()) {
      if (!files.count(part["file"].string())) throw InputError("part " + name + " needs a file that is not listed");
      for (const Json& weights : part["weights"].array()) {
        if (!files.count(weights.string())) throw InputError("part " + name + " needs a file that is not listed");
      }
    }
    for (const char* name : {"denoiser", "vae_encoder", "vae_decoder"}) values["parts"][name];
    if (!files.count("modulation.safetensors")) throw InputError("it lists no modulation.safetensors");
  } catch (const InputError& failure) {
    throw InputError(path.string() + ": " + failure.what() + "; export the artifact again");
  }
  return manifest;
}

void Manifest::check_files() const {
  std::vector<std::future<std::string>> digests;
  const auto& files = values["files"].object();
  for (const auto& [name, entry] : files) check_file(folder / name, entry["bytes"].integer());
  for (const auto& [name, entry] : files) {
    digests.push_back(std::async(std::launch::async, [path = folder / name] {
      return sha256_hex(MappedFile::open(path, "a file of the artifact")->text());
    }));
  }
  size_t index = 0;
  for (const auto& [name, entry] : files) {
    if (digests[index++].get() != entry["sha256"].string()) {
      throw InputError((folder / name).string() +
                       " is not the file that was exported (another SHA-256 than the manifest's); export or fetch the "
                       "artifact again");
    }
  }
}

void Manifest::check_target(at::Device device) const {
  const std::string wanted = values["target"]["device"].string();
  const std::string found = device.is_cuda() ? "cuda" : "cpu";
  if (wanted != "any" && wanted != found) {
    throw InputError(folder.string() + " was exported for " + one_line(wanted, 40) + " and cannot run on " + found +
                     "; choose --device " + one_line(wanted, 40) + " or export it for " + found);
  }
  const Json* capability = values["target"].find("compute_capability");
  if (device.is_cuda() && capability && !capability->is_null()) {
    const auto [major, minor] = compute_capability(device);
    const std::vector<Json>& made_for = capability->array();
    if (made_for.size() != 2 || made_for[0].integer() != major || made_for[1].integer() != minor) {
      throw InputError(folder.string() + " was exported for a GPU of another compute capability than " + device.str() +
                       " has, " + std::to_string(major) + "." + std::to_string(minor) + "; export it on this machine");
    }
  }
  const Json* exported = values["versions"].find("torch");
  const std::string torch = exported ? exported->string() : "none";
  if (release(torch) != release(TORCH_VERSION)) {
    throw InputError(folder.string() + " was compiled for torch " + one_line(torch, 40) + ", this program has " +
                     TORCH_VERSION + "; export it again, or build this program with torch " +
                     one_line(release(torch), 40));
  }
}

}  // namespace lavin
