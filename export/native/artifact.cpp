#include "artifact.h"

#include <ATen/DynamicLibrary.h>
#include <sys/stat.h>
#include <torch/version.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <future>

#include "error.h"
#include "json.h"

namespace lavin {

namespace {

constexpr char kManifest[] = "manifest.json";
constexpr size_t kMaxBytes = 16 << 20;
constexpr char kExact[] = "exact";
constexpr int64_t kMostEvaluations = 1000;

bool plain_name(const std::string& name) {
  static constexpr char kKnown[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
  return !name.empty() && name.size() <= 200 && std::isalnum(static_cast<unsigned char>(name[0])) &&
         name != kManifest && name.find_first_not_of(kKnown) == std::string::npos;
}

bool speed_name(const std::string& name) {
  static constexpr char kKnown[] = "abcdefghijklmnopqrstuvwxyz0123456789_-";
  return !name.empty() && name.size() <= 64 && name[0] >= 'a' && name[0] <= 'z' &&
         name.find_first_not_of(kKnown) == std::string::npos;
}

// Indices of evaluations with 0 among them.
std::set<int64_t> evaluations_of(const Json& json) {
  std::set<int64_t> found;
  for (const int64_t index : wholes(json)) {
    if (index < 0 || index >= kMostEvaluations) throw InputError("it has evaluation " + std::to_string(index));
    found.insert(index);
  }
  if (!found.count(0)) throw InputError("a set of evaluations lacks 0");
  return found;
}

std::vector<double> times_of(const Json& json) {
  if (!json.is_array()) throw InputError("times is no list of numbers");
  std::vector<double> times;
  for (const Json& item : json) {
    if (!item.is_number()) throw InputError("times is no list of numbers");
    times.push_back(item.get<double>());
  }
  const bool ends = times.size() >= 2 && times.front() == 0 && times.back() == 1;
  const auto falls = [](double before, double after) { return !(before < after); };
  if (!ends || std::adjacent_find(times.begin(), times.end(), falls) != times.end()) {
    throw InputError("times is no list of numbers increasing from 0 to 1");
  }
  if (times.size() > kMostEvaluations + 1) throw InputError("times has too many numbers");
  return times;
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

at::ScalarType scalar_type(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "float16") return at::kHalf;
  throw InputError("dtype is " + one_line(name, 40) + ", expected float32, float16 or bfloat16");
}

Ranges ranges_of(const Json& json) {
  Ranges ranges;
  for (const auto& [name, bounds] : json.get<std::map<std::string, Json>>()) {
    const std::vector<int64_t> ends = wholes(bounds);
    if (ends.size() != 2) throw InputError("the range of " + one_line(name, 40) + " has no two ends");
    ranges[name] = {ends[0], ends[1]};
  }
  return ranges;
}

}  // namespace

static void from_json(const Json& json, Dimension& size) {
  if (!json.is_string()) {
    size = {whole(json), ""};
    return;
  }
  const auto text = json.get<std::string>();
  const size_t star = text.find('*');
  if (star != std::string::npos) {
    size.multiple = 0;
    std::from_chars(text.data(), text.data() + star, size.multiple);
  }
  size.name = text.substr(star + 1);  // all of it where there is no star
  if (size.multiple < 1 || size.name.empty()) throw InputError("a shape has " + one_line(text, 40));
}

static void from_json(const Json& json, Input& input) {
  json.at("name").get_to(input.name);
  input.dtype = scalar_type(json.at("dtype").get<std::string>());
  json.at("shape").get_to(input.shape);
}

static void from_json(const Json& json, Part& part) {
  json.at("file").get_to(part.file);
  json.at("machine").get_to(part.machine);
  json.at("cpu_level").get_to(part.cpu_level);
  json.at("weights").get_to(part.weights);
  json.at("inputs").get_to(part.inputs);
  const Json& ranges = json.at("ranges");
  for (const Json& one : ranges.is_array() ? ranges : Json::array({ranges})) part.ranges.push_back(ranges_of(one));
}

static void from_json(const Json& json, Speed& speed) {
  if (!json.is_object()) throw InputError("a speed is no object");
  for (const auto& [name, value] : json.items()) {
    if (name == "evaluations") {
      speed.evaluations = whole(value);
      if (*speed.evaluations < 1 || *speed.evaluations > kMostEvaluations) {
        throw InputError("a speed has " + std::to_string(*speed.evaluations) + " evaluations");
      }
    } else if (name == "times") {
      speed.times = times_of(value);
    } else if (name == "refresh" && value.is_string()) {
      if (value != "task") throw InputError("refresh is " + one_line(value.get<std::string>(), 40));
      speed.once_a_task = true;
    } else if (name == "refresh") {
      speed.refresh = evaluations_of(value);
    } else if (name == "guided") {
      speed.guided = evaluations_of(value);
    } else {
      throw InputError("a speed has " + one_line(name, 40));
    }
  }
  if (speed.evaluations && speed.times) throw InputError("a speed has evaluations and times, expected one of them");
  if (speed.owns_grid()) speed.check_sets(speed.count());
}

static void from_json(const Json& json, FileEntry& entry) {
  entry.bytes = whole(json.at("bytes"));
  json.at("sha256").get_to(entry.sha256);
}

static void from_json(const Json& json, Manifest& manifest) {
  if (json.value("format", Json()) != "lavin-rt artifact") throw InputError("it is not of a lavin-rt artifact");
  if (json.at("version") != 1) throw InputError("its version is another one than 1, which this program reads");
  const auto kind = json.at("kind").get<std::string>();
  if (kind != "aoti") throw InputError("it is of kind " + one_line(kind, 40) + ", this program runs aoti");
  json.at("vae_fingerprint").get_to(manifest.vae_fingerprint);
  json.at("latent_scaling").at("shift").get_to(manifest.latent_shift);
  json.at("latent_scaling").at("scale").get_to(manifest.latent_scale);
  manifest.size = whole(json.at("size"));
  manifest.schedules = wholes(json.at("schedules"));
  const Json speeds = json.value("speeds", Json());  // artifacts of the first version have none
  if (!speeds.is_null() && !speeds.is_object()) throw InputError("speeds is no object");
  if (!speeds.is_null()) speeds.get_to(manifest.speeds);
  json.at("files").get_to(manifest.files);
  json.at("parts").get_to(manifest.parts);
  const Json& target = json.at("target");
  target.at("device").get_to(manifest.device);
  const Json capability = target.value("compute_capability", Json());
  if (!capability.is_null()) manifest.capability = wholes(capability);
  manifest.torch = json.at("versions").value("torch", "none");
}

void Speed::check_sets(int64_t count) const {
  for (const auto& [name, indices] : {std::pair{"refresh", &refresh}, {"guided", &guided}}) {
    if (*indices && *(*indices)->rbegin() >= count) {
      throw InputError(std::string(name) + " has evaluation " + std::to_string(*(*indices)->rbegin()) +
                       ", the grid has " + std::to_string(count) + ": 0 to " + std::to_string(count - 1) +
                       "; take it out or give a longer grid");
    }
  }
}

const Speed& Manifest::speed(const std::string& name) const {
  const auto found = speeds.find(name);
  if (found != speeds.end()) return found->second;
  std::vector<std::string> names;
  for (const auto& [known, speed] : speeds) names.push_back(known);
  throw InputError(folder.string() + " has no speed " + one_line(name, 60) + "; it has " + joined(names) +
                   ": choose one of these, or export it for that speed");
}

Manifest Manifest::read(const fs::path& folder) {
  const fs::path path = folder / kManifest;
  std::error_code error;
  if (fs::is_symlink(path, error)) throw InputError(path.string() + " is a link; artifacts hold none: copy the file");
  auto file = MappedFile::open(path, "the manifest of an artifact");
  if (file->size() > kMaxBytes) throw InputError(path.string() + " is too large for a manifest; export it again");
  try {
    auto manifest = parse(file->text());
    manifest.folder = folder;
    return manifest;
  } catch (const std::exception& failure) {
    throw InputError(path.string() + ": " + reason(failure) + "; export the artifact again");
  }
}

Manifest Manifest::parse(std::string_view text) {
  auto manifest = parse_json(text).get<Manifest>();
  if (manifest.size < 16 || manifest.size % 16 != 0) {
    throw InputError("its size is " + std::to_string(manifest.size) + ", no positive multiple of 16");
  }
  for (const auto& [name, entry] : manifest.files) {
    if (!plain_name(name)) throw InputError("the file name " + one_line(name, 60) + " is no plain one");
    if (entry.bytes < 0 || entry.sha256.size() != 64) throw InputError("file " + name + " has no size and hash");
  }
  const auto listed = [&](const std::string& file) { return manifest.files.count(file) > 0; };
  for (const auto& [name, part] : manifest.parts) {
    if (!listed(part.file) || !std::all_of(part.weights.begin(), part.weights.end(), listed)) {
      throw InputError("part " + one_line(name, 40) + " needs a file that is not listed");
    }
  }
  for (const auto& [name, speed] : manifest.speeds) {
    if (!speed_name(name)) throw InputError("a speed is named " + one_line(name, 60));
    if (speed.keeps() && !manifest.parts.count(kKeptDenoiser)) {
      throw InputError("it has the speed " + name + ", but no part " + kKeptDenoiser);
    }
  }
  const Speed& exact = manifest.speeds[kExact];  // which is there even if it is not listed
  if (exact.owns_grid() || exact.keeps() || exact.guided) throw InputError("its speed exact is another one");
  if (const auto kept = manifest.parts.find(kKeptDenoiser); kept != manifest.parts.end()) {
    const auto& inputs = kept->second.inputs;
    if (inputs.size() != kKeys + 2 || inputs[kKeys].shape.size() != 6) {
      throw InputError(std::string("part ") + kKeptDenoiser + " does not take keys and values");
    }
  }
  for (const char* name : {kDenoiser, "vae_encoder", "vae_decoder"}) {
    if (!manifest.parts.count(name)) throw InputError(std::string("it has no part ") + name);
  }
  if (!listed("modulation.safetensors")) throw InputError("it lists no modulation.safetensors");
  return manifest;
}

void Manifest::check_files() const {
  std::vector<std::future<std::string>> digests;
  for (const auto& [name, entry] : files) check_file(folder / name, entry.bytes);
  for (const auto& [name, entry] : files) {
    digests.push_back(std::async(std::launch::async, [path = folder / name] {
      return sha256_hex(MappedFile::open(path, "a file of the artifact")->text());
    }));
  }
  size_t index = 0;
  for (const auto& [name, entry] : files) {
    if (digests[index++].get() != entry.sha256) {
      throw InputError((folder / name).string() +
                       " is not the file that was exported (another SHA-256 than the manifest's); export or fetch the "
                       "artifact again");
    }
  }
}

void Manifest::check_target(at::Device on) const {
  const std::string found = on.is_cuda() ? "cuda" : "cpu";
  if (device != "any" && device != found) {
    throw InputError(folder.string() + " was exported for " + one_line(device, 40) + " and cannot run on " + found +
                     "; choose --device " + one_line(device, 40) + " or export it for " + found);
  }
  if (on.is_cuda() && !capability.empty()) {
    const auto [major, minor] = compute_capability(on);
    if (capability != std::vector<int64_t>{major, minor}) {
      throw InputError(folder.string() + " was exported for a GPU of compute capability " + joined(capability, ".") +
                       ", " + on.str() + " has " + joined(std::vector{major, minor}, ".") +
                       "; export it on this machine");
    }
  }
  if (release(torch) != release(TORCH_VERSION)) {
    throw InputError(folder.string() + " was compiled for torch " + one_line(torch, 40) + ", this program has " +
                     TORCH_VERSION + "; export it again, or build this program with torch " +
                     one_line(release(torch), 40));
  }
}

}  // namespace lavin
