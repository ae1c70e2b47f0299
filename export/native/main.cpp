// lavin-native: an AOTInductor artifact, pictures in, a picture out, without Python.

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torch/version.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <tuple>

#include "context.h"
#include "error.h"
#include "pictures.h"
#include "runner.h"
#include "safetensors.h"

namespace {

using lavin::InputError;

constexpr char kUsage[] = R"(usage: lavin-native --artifact DIR --task DIR|FILE --query PICTURE -o OUT [options]

Runs an AOTInductor artifact of lavin-rt (made by `lavin-rt export aoti`) without Python.

what to do
  --artifact DIR       the artifact's folder
  --task DIR|FILE      folder of *_input and *_target pictures, or a context that
                       `lavin-rt run --save-context` wrote (.safetensors)
  --query PICTURE      the picture to answer
  -o, --output OUT     the answer
  Pictures are PNG.

how to do it
  --pairs N            pairs chosen from the task's folder (default: 4)
  --size N|HxW         height x width, multiples of 16 (default: an encoded context's, else the model's)
  --steps N            knots of the schedule, one that the artifact has (default: 20)
  --guidance X         guidance scale; 1.0 is faster (default: 1.5)
  --seed N             of pairs and noise, the same as in Python (default: 0)
  --noise FILE         tensor "noise" [1, 16, 1, height/8, width/8] of a .safetensors file instead
  --device cpu|cuda    (default: cpu)
  --threads N          (default: as many as torch takes)

output
  --save-latents FILE  also write the final latents as "latents" of a .safetensors file
  --time               print seconds as JSON on stdout
  --repeat N           answer N times, for --time (default: 1)
  -q, --quiet          print errors only
  --version, --help

exit codes: 0 done, 1 the run failed, 2 something given cannot be used
)";

struct Options {
  std::string artifact, task, query, output, size, noise, save_latents, device = "cpu", seed_text = "0";
  int64_t pairs = 4, steps = 20, threads = 0, repeat = 1;
  uint64_t seed = 0;
  double guidance = 1.5;
  bool time = false, quiet = false;
};

// The seed, and its text as Python writes the number: the choice of pairs is by the text.
std::pair<uint64_t, std::string> parse_seed(const std::string& text) {
  char* end = nullptr;
  errno = 0;
  const bool negative = !text.empty() && text[0] == '-';
  const uint64_t value =
      negative ? static_cast<uint64_t>(std::strtoll(text.c_str(), &end, 10)) : std::strtoull(text.c_str(), &end, 10);
  const bool digits = text.size() > negative && text.find_first_not_of("0123456789", negative) == std::string::npos;
  if (!digits || errno || *end) {
    throw InputError("--seed is " + lavin::one_line(text, 40) + "; expected a whole number from -2**63 to 2**64 - 1");
  }
  return {value, negative ? std::to_string(static_cast<int64_t>(value)) : std::to_string(value)};
}

double parse_number(const std::string& text, const std::string& name) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end || !std::isfinite(value)) {
    throw InputError(name + " is " + lavin::one_line(text, 40) + "; expected a finite number, such as 1.5");
  }
  return value;
}

Options parse(int count, char** words) {
  Options options;
  for (int i = 1; i < count; ++i) {
    std::string name = words[i];
    std::optional<std::string> given;
    if (const size_t equals = name.find('='); name.starts_with("--") && equals != std::string::npos) {
      given = name.substr(equals + 1);
      name.resize(equals);
    }
    const auto value = [&]() -> std::string {
      if (given) return *given;
      if (i + 1 >= count) throw InputError(name + " needs a value; see lavin-native --help");
      return words[++i];
    };
    if (name == "--artifact")
      options.artifact = value();
    else if (name == "--task")
      options.task = value();
    else if (name == "--query")
      options.query = value();
    else if (name == "-o" || name == "--output")
      options.output = value();
    else if (name == "--pairs")
      options.pairs = lavin::parse_integer(value(), name, 1, 100'000);
    else if (name == "--size")
      options.size = value();
    else if (name == "--steps")
      options.steps = lavin::parse_integer(value(), name, 2, 1000);
    else if (name == "--guidance")
      options.guidance = parse_number(value(), name);
    else if (name == "--seed")
      std::tie(options.seed, options.seed_text) = parse_seed(value());
    else if (name == "--noise")
      options.noise = value();
    else if (name == "--device")
      options.device = value();
    else if (name == "--threads")
      options.threads = lavin::parse_integer(value(), name, 1, 4096);
    else if (name == "--save-latents")
      options.save_latents = value();
    else if (name == "--repeat")
      options.repeat = lavin::parse_integer(value(), name, 1, 1'000'000);
    else if (name == "--time")
      options.time = true;
    else if (name == "-q" || name == "--quiet")
      options.quiet = true;
    else
      throw InputError("unknown option " + lavin::one_line(name, 60) + "; see lavin-native --help");
  }
  const std::pair<const char*, const std::string*> needed[] = {{"--artifact", &options.artifact},
                                                               {"--task", &options.task},
                                                               {"--query", &options.query},
                                                               {"--output", &options.output}};
  for (const auto& [name, text] : needed) {
    if (text->empty()) throw InputError(std::string(name) + " is missing; see lavin-native --help");
  }
  if (options.device != "cpu" && options.device != "cuda") {
    throw InputError("--device is " + lavin::one_line(options.device, 40) + "; expected cpu or cuda");
  }
  return options;
}

// A line on a terminal's stderr that tells how far a sampling is.
class ProgressLine {
 public:
  explicit ProgressLine(bool quiet) : shown_(!quiet && ::isatty(STDERR_FILENO)) {}
  void operator()(int64_t done, int64_t total) const {
    if (shown_) {
      std::fprintf(stderr, done == total ? "\r\033[K" : "\rsampling %ld/%ld", static_cast<long>(done),
                   static_cast<long>(total));
    }
  }

 private:
  bool shown_;
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::string listed(const std::vector<double>& seconds) {
  std::string text;
  char number[32];
  for (double value : seconds) {
    std::snprintf(number, sizeof number, "%s%.6f", text.empty() ? "" : ", ", value);
    text += number;
  }
  return "[" + text + "]";
}

at::Tensor read_noise(const std::string& path, int64_t height, int64_t width) {
  const at::Tensor noise = lavin::Safetensors::open(path).at("noise");
  const std::vector<int64_t> expected{1, 16, 1, height / 8, width / 8};
  if (noise.sizes() != at::IntArrayRef(expected) || !noise.is_floating_point()) {
    throw InputError(lavin::one_line(path) + ": noise is [" + lavin::joined(noise.sizes()) +
                     "]; expected floating point [" + lavin::joined(expected) + "]");
  }
  return noise.to(at::kFloat);
}

void run(const Options& options) {
  lavin::check_output(options.output);
  if (!options.save_latents.empty()) lavin::check_writable(options.save_latents);
  std::error_code error;
  if (std::filesystem::equivalent(options.query, options.output, error)) {
    throw InputError(lavin::one_line(options.query) +
                     ": the output would replace the query itself; give another --output");
  }
  if (options.threads) at::set_num_threads(static_cast<int>(options.threads));

  auto start = std::chrono::steady_clock::now();
  const bool encoded = std::filesystem::path(options.task).extension() == ".safetensors";
  const std::vector<lavin::Pair> pairs =
      encoded ? std::vector<lavin::Pair>{} : lavin::choose_pairs(options.task, options.pairs, options.seed_text);
  const at::Tensor query = lavin::load_picture(options.query);
  const lavin::Runner runner(options.artifact, at::Device(options.device));
  const double loading = seconds_since(start);

  start = std::chrono::steady_clock::now();
  std::vector<at::Tensor> frames;
  auto [height, width] =
      lavin::parse_size(options.size.empty() ? std::to_string(runner.manifest().size) : options.size);
  if (encoded) {
    const auto context = lavin::EncodedContext::load(options.task, runner.manifest().vae_fingerprint);
    if (!options.size.empty() && (context.height != height || context.width != width)) {
      const std::string size = std::to_string(context.height) + "x" + std::to_string(context.width);
      throw InputError(lavin::one_line(options.task) + ": encoded at size " + size + ", asked for " + options.size +
                       "; run at " + size + " or encode it again");
    }
    height = context.height, width = context.width;
    frames.push_back(context.latents);
  }
  const at::Tensor noise =
      options.noise.empty() ? lavin::draw_noise(options.seed, height, width) : read_noise(options.noise, height, width);
  for (const lavin::Pair& pair : pairs) {
    for (const auto& path : {pair.input, pair.target}) {
      frames.push_back(runner.encode(lavin::resize(lavin::load_picture(path), height, width)).cpu());
    }
  }
  const double context = seconds_since(start);

  std::vector<double> sampling, answering;
  at::Tensor latents, picture;
  for (int64_t i = 0; i < options.repeat; ++i) {
    start = std::chrono::steady_clock::now();
    std::vector<at::Tensor> condition = frames;
    condition.push_back(runner.encode(lavin::resize(query, height, width)).cpu());
    const auto began = std::chrono::steady_clock::now();
    latents =
        runner.sample(at::cat(condition, 2), noise, options.steps, options.guidance, ProgressLine(options.quiet)).cpu();
    sampling.push_back(seconds_since(began));
    picture = runner.decode(latents);
    answering.push_back(seconds_since(start));
  }
  lavin::save_picture(picture, options.output);
  if (!options.save_latents.empty()) lavin::save_tensor(options.save_latents, "latents", latents);
  if (options.time) {
    std::printf("{\"loading\": %.6f, \"context\": %.6f, \"sampling\": %s, \"query\": %s, \"threads\": %d}\n", loading,
                context, listed(sampling).c_str(), listed(answering).c_str(), at::get_num_threads());
  } else if (!options.quiet) {
    std::printf("%s  %s\nloading %.2f s, context %.2f s, query %.2f s\n", options.output.c_str(),
                options.noise.empty() ? ("seed " + options.seed_text).c_str() : ("noise of " + options.noise).c_str(),
                loading, context, answering.back());
  }
}

int fail(const std::string& message, int code) {
  std::fprintf(stderr, "lavin-native: error: %s\n", lavin::one_line(message, 1500).c_str());
  return code;
}

}  // namespace

int main(int count, char** words) {
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word == "--help" || word == "-h") {
      std::printf("%s", kUsage);
      return 0;
    }
    if (word == "--version") {
      std::printf("lavin-native %s, torch %s\n", LAVIN_VERSION, TORCH_VERSION);
      return 0;
    }
  }
  try {
    const at::NoGradGuard no_gradients;
    run(parse(count, words));
    return 0;
  } catch (const InputError& error) {
    return fail(error.what(), 2);
  } catch (const c10::Error& error) {
    return fail(error.what_without_backtrace(), 1);
  } catch (const std::exception& error) {
    return fail(error.what(), 1);
  }
}
