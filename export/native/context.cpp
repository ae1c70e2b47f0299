#include "context.h"

#include <algorithm>
#include <charconv>
#include <iterator>
#include <map>
#include <set>
#include <tuple>

#include "error.h"
#include "pictures.h"

namespace lavin {

namespace {

// What Python takes for pictures; this program reads some of them.
constexpr const char* kPictures[] = {".png", ".jpg",  ".jpeg", ".webp", ".gif", ".bmp",
                                     ".tif", ".tiff", ".ppm",  ".pgm",  ".avif"};

bool is_picture(const fs::path& path) {
  return std::find(std::begin(kPictures), std::end(kPictures), suffix(path)) != std::end(kPictures);
}

std::map<std::string, Pair> read_template(const fs::path& folder) {
  const std::string where = one_line(folder.string());
  std::error_code error;
  if (!fs::is_directory(folder, error)) {
    throw InputError(where + ": no such folder; expected one with *_input and *_target pictures");
  }
  std::map<std::string, Pair> pairs;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const fs::path& path = entry.path();
    const std::string name = path.filename().string(), stem = path.stem().string();
    if (name[0] == '.') continue;
    const std::string whole = entry.is_directory(error) ? name : stem;
    const size_t last = whole.rfind('_');
    if (last == std::string::npos) continue;
    const std::string role = whole.substr(last + 1), key = whole.substr(0, whole.find('_'));
    if (role != "input" && role != "target") continue;
    if (entry.is_directory(error)) {
      throw InputError(where + ": " + name + " is a clip; this program takes pictures, run clips with lavin-rt run");
    }
    if (!is_picture(path)) continue;
    Pair& pair = pairs.emplace(key, Pair{key, {}, {}}).first->second;
    fs::path& place = role == "input" ? pair.input : pair.target;
    if (!place.empty()) {
      throw InputError(where + ": " + place.filename().string() + ", " + name + " all begin with " + key +
                       "_; expected one, as the text before the first _ tells pairs apart; rename them");
    }
    place = path;
  }
  if (error) throw InputError(where + ": cannot be read (" + error.message() + "); check its permissions");
  if (pairs.empty()) {
    throw InputError(where + ": no *_input, *_target pictures here; expected pairs as 0_input.png, 0_target.png");
  }
  for (const auto& [key, pair] : pairs) {
    if (pair.input.empty() || pair.target.empty()) {
      const fs::path& lonely = pair.input.empty() ? pair.target : pair.input;
      throw InputError(
          where + ": no partner for " + lonely.filename().string() +
          "; expected one _input and one _target for every text before the first _; add what is missing or "
          "take these away");
    }
  }
  return pairs;
}

}  // namespace

fs::path find_task(const std::string& task, const fs::path& templates) {
  std::error_code error;
  if (fs::is_directory(task, error)) return task;
  std::set<std::string> known, fitting;
  for (const auto& entry : fs::directory_iterator(templates, error)) {
    const std::string name = entry.path().filename().string();
    if (name[0] != '.' && entry.is_directory(error)) known.insert(name);
  }
  if (known.count(task)) return templates / task;
  std::copy_if(known.begin(), known.end(), std::inserter(fitting, fitting.end()),
               [&](const std::string& name) { return !task.empty() && name.starts_with(task); });
  if (fitting.size() == 1) return templates / *fitting.begin();
  if (!fitting.empty()) {
    throw InputError("task " + one_line(task, 60) + " fits " + joined(fitting) + "; give more of the name");
  }
  throw InputError(one_line(task) + ": no such folder or task; expected a folder with *_input and *_target pictures" +
                   (known.empty() ? ", the artifact has no tasks" : " or one of " + joined(known)));
}

std::vector<Pair> choose_pairs(const fs::path& folder, int64_t count, const std::string& seed) {
  const auto pairs = read_template(folder);
  if (count > static_cast<int64_t>(pairs.size())) {
    throw InputError(std::to_string(count) + " context pairs asked for, " + std::to_string(pairs.size()) +
                     " are there; ask for " + std::to_string(pairs.size()) + " at most");
  }
  std::map<std::string, Pair> ranked;
  for (const auto& [name, pair] : pairs) ranked.emplace(sha256_hex(seed + ":" + name), pair);
  std::vector<Pair> chosen;
  for (const auto& [hash, pair] : ranked) chosen.push_back(pair);
  chosen.resize(count);
  return chosen;
}

EncodedContext EncodedContext::load(const fs::path& path, const std::string& vae_fingerprint) {
  return of(Safetensors::open(path), vae_fingerprint);
}

EncodedContext EncodedContext::of(const Safetensors& file, const std::string& vae_fingerprint) {
  const std::string name = one_line(file.path.string());
  const auto described = [&](const std::string& key) {
    auto found = file.metadata.find(key);
    return found == file.metadata.end() ? std::string() : found->second;
  };
  if (described("format") != "lavin-rt encoded context") {
    throw InputError(name + ": not an encoded context of lavin-rt by its metadata; expected a file saved as one");
  }
  if (described("version") != "1") {
    throw InputError(name + ": is of version " + one_line(described("version"), 20) +
                     ", this program reads 1; encode it again");
  }
  if (described("vae_fingerprint") != vae_fingerprint) {
    throw InputError(name + ": encoded by another VAE (fingerprint " + one_line(described("vae_fingerprint"), 12) +
                     ", this one has " + vae_fingerprint.substr(0, 12) +
                     "); encode the task's context again with this VAE");
  }
  if (described("frames_per_clip") != "1") {
    throw InputError(name + ": holds clips of " + one_line(described("frames_per_clip"), 20) +
                     " frames; this program takes pictures, run clips with lavin-rt run");
  }
  if (described("posterior") != "mean") {
    throw InputError(name + ": holds the posterior's " + one_line(described("posterior"), 20) +
                     ", this program takes its mean; encode it again");
  }
  EncodedContext context;
  std::tie(context.height, context.width) = parse_size(described("size"));
  context.pairs = parse_integer(described("pairs"), "number of pairs in " + name, 1, 100'000);
  const std::vector<int64_t> shape{1, 16, 2 * context.pairs, context.height / 8, context.width / 8};
  const at::Tensor& latents = file.at("latents");
  if (latents.sizes() != at::IntArrayRef(shape) || !latents.is_floating_point() || latents.element_size() == 1 ||
      !latents.isfinite().all().item<bool>()) {
    throw InputError(name + ": its latents are not the finite numbers that its metadata announce; encode it again");
  }
  context.latents = latents.to(at::kFloat);
  return context;
}

int64_t parse_integer(const std::string& text, const std::string& what, int64_t least, int64_t most) {
  int64_t value = 0;
  auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc() || stop != text.data() + text.size() || value < least || value > most) {
    throw InputError(what + " is " + (text.empty() ? "empty" : one_line(text, 40)) + "; expected a whole number from " +
                     std::to_string(least) + " to " + std::to_string(most));
  }
  return value;
}

std::pair<int64_t, int64_t> parse_size(const std::string& text) {
  const size_t cross = text.find_first_of("xX");
  try {
    const int64_t height = parse_integer(text.substr(0, cross), "", 16, 999'999);
    const int64_t width = cross == std::string::npos ? height : parse_integer(text.substr(cross + 1), "", 16, 999'999);
    if (height % 16 == 0 && width % 16 == 0) return {height, width};
  } catch (const InputError&) {
  }
  throw InputError("size " + one_line(text, 40) +
                   ": expected positive multiples of 16, as 512 or as 384x640 (height x width)");
}

}  // namespace lavin
