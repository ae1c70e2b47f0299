// lavin-native: an AOTInductor artifact, pictures in, a picture out, without Python.

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <fcntl.h>
#include <torch/version.h>
#include <unistd.h>

#include <CLI/CLI.hpp>

#include <cerrno>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "context.h"
#include "error.h"
#include "json.h"
#include "pictures.h"
#include "runner.h"
#include "safetensors.h"

namespace {

using lavin::InputError;

constexpr char kAbout[] =
    "Runs an AOTInductor artifact of lavin-rt (made by `lavin-rt export aoti`) without Python.\n"
    "Pictures are PNG; a saved context is what `lavin-rt run --save-context` wrote.";

struct Options {
  std::string artifact, task, query, output, size, noise, save_latents, device = "cpu", seed_text = "0";
  std::string speed = "exact";
  int64_t pairs = 4, steps = 0, threads = 0, repeat = 1;
  uint64_t seed = 0;
  double guidance = 1.5;
  bool allow_huge = false, time = false, quiet = false;
};

// All of an option's text as a number.
template <typename Number>
Number parse(const char* name, const std::string& text, const char* expected) {
  const char* end = text.data() + text.size();
  Number value{};
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stop != end || !std::isfinite(static_cast<double>(value))) {
    throw InputError(std::string(name) + " is " + lavin::one_line(text, 40) + "; expected " + expected);
  }
  return value;
}

// Sets the seed, and its text as Python writes the number: the choice of pairs is by the text.
void set_seed(Options& options, const std::string& text) {
  constexpr char kExpected[] = "a whole number from -2**63 to 2**64 - 1";
  const bool negative = text.starts_with('-');
  options.seed = negative ? parse<int64_t>("--seed", text, kExpected) : parse<uint64_t>("--seed", text, kExpected);
  options.seed_text = negative ? std::to_string(static_cast<int64_t>(options.seed)) : std::to_string(options.seed);
}

// Fills `options` when `app` parses.
void add_options(CLI::App& app, Options& options) {
  const auto text = [&app](const char* name, const char* type, std::string& value, const char* about) {
    return app.add_option(name, value, about)->type_name(type);
  };
  const auto integer = [&app](const char* name, int64_t& value, int64_t least, int64_t most, const char* about) {
    const auto read = [=, &value](const std::string& word) { value = lavin::parse_integer(word, name, least, most); };
    app.add_option_function<std::string>(name, read, about)->type_name("N");
  };
  const auto guidance = [&options](const std::string& word) {
    options.guidance = parse<double>("--guidance", word, "a finite number, such as 1.5");
  };
  const auto seed = [&options](const std::string& word) { set_seed(options, word); };

  app.option_defaults()->take_last()->group("what to do");
  text("--artifact", "DIR", options.artifact, "the artifact's folder")->required();
  text("--task", "DIR|NAME|FILE", options.task,
       "*_input and *_target pictures, a task of the artifact, or a saved context")
      ->required();
  text("--query", "PICTURE", options.query, "the picture to answer")->required();
  text("-o,--output", "OUT", options.output, "the answer")->required();

  app.option_defaults()->group("how to do it");
  integer("--pairs", options.pairs, 1, 100'000, "pairs chosen from the task's folder (default: 4)");
  text("--size", "N|HxW", options.size,
       "height x width, multiples of 16 (default: the saved context's or the model's)");
  text("--speed", "NAME", options.speed, "exact, or another that the artifact serves (default: exact)");
  integer("--steps", options.steps, 2, 1000, "knots of the schedule, one that the artifact has (default: 20)");
  app.add_option_function<std::string>("--guidance", guidance, "guidance scale; 1.0 is faster (default: 1.5)")
      ->type_name("X");
  app.add_option_function<std::string>("--seed", seed, "of pairs and noise, as in Python (default: 0)")->type_name("N");
  text("--noise", "FILE", options.noise, "take \"noise\" [1, 16, 1, height/8, width/8] of a .safetensors file");
  const auto device = CLI::IsMember({"cpu", "cuda"}).description("");
  text("--device", "cpu|cuda", options.device, "where to run (default: cpu)")->check(device);
  integer("--threads", options.threads, 1, 4096, "of the CPU (default: as many as torch takes)");

  app.add_flag("--allow-huge", options.allow_huge, "read pictures of more than 178 megapixels, if memory allows");

  app.option_defaults()->group("output");
  text("--save-latents", "FILE", options.save_latents, "write the final \"latents\" to a .safetensors file");
  app.add_flag("--time", options.time, "print seconds as JSON on stdout");
  integer("--repeat", options.repeat, 1, 1'000'000, "answer N times, for --time (default: 1)");
  app.add_flag("-q,--quiet", options.quiet, "print errors only");
  app.set_version_flag("--version", "lavin-native " LAVIN_VERSION ", torch " TORCH_VERSION, "print it and exit");
  app.set_help_flag("-h,--help", "print this and exit");
  app.footer("exit codes: 0 done, 1 the run failed, 2 something given cannot be used");
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
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
    throw InputError(lavin::one_line(options.query) + ": the output would replace the query; give another --output");
  }
  if (options.threads) at::set_num_threads(static_cast<int>(options.threads));

  auto start = std::chrono::steady_clock::now();
  const bool encoded = std::filesystem::path(options.task).extension() == ".safetensors";
  std::vector<lavin::Pair> pairs;
  if (!encoded) {
    const auto folder = lavin::find_task(options.task, std::filesystem::path(options.artifact) / "template");
    pairs = lavin::choose_pairs(folder, options.pairs, options.seed_text);
  }
  const int64_t most = options.allow_huge ? std::numeric_limits<int64_t>::max() : lavin::kMaxPixels;
  const at::Tensor query = lavin::load_picture(options.query, most);
  const std::optional<int64_t> steps = options.steps ? std::optional(options.steps) : std::nullopt;
  const lavin::Runner runner(options.artifact, at::Device(options.device), options.speed, steps);
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
      frames.push_back(runner.encode(lavin::resize(lavin::load_picture(path, most), height, width)).cpu());
    }
  }
  const lavin::Kept kept = runner.context_keys(at::cat(frames, 2));
  const double context = seconds_since(start);

  const bool shown = !options.quiet && ::isatty(STDERR_FILENO);
  const auto progress = [shown](int64_t done, int64_t total) {
    const std::string count = std::to_string(done) + "/" + std::to_string(total);
    if (shown) std::fputs(done == total ? "\r\033[K" : ("\rsampling " + count).c_str(), stderr);
  };
  std::vector<double> sampling, answering;
  at::Tensor latents, picture;
  for (int64_t i = 0; i < options.repeat; ++i) {
    start = std::chrono::steady_clock::now();
    std::vector<at::Tensor> condition = frames;
    condition.push_back(runner.encode(lavin::resize(query, height, width)).cpu());
    const auto began = std::chrono::steady_clock::now();
    latents = runner.sample(at::cat(condition, 2), noise, options.guidance, kept, progress).cpu();
    sampling.push_back(seconds_since(began));
    picture = runner.decode(latents);
    answering.push_back(seconds_since(start));
  }
  lavin::save_picture(picture, options.output);
  if (!options.save_latents.empty()) lavin::save_tensor(options.save_latents, "latents", latents);
  if (options.time) {
    const int threads = at::get_num_threads();
    const lavin::Json times{
        {"loading", loading}, {"context", context}, {"sampling", sampling}, {"query", answering}, {"threads", threads}};
    std::printf("%s\n", times.dump().c_str());
  } else if (!options.quiet) {
    const std::string from = options.noise.empty() ? "seed " + options.seed_text : "noise of " + options.noise;
    std::printf("%s  %s\nloading %.2f s, context %.2f s, query %.2f s\n", options.output.c_str(), from.c_str(), loading,
                context, answering.back());
  }
}

// Whether all that was printed has been written.
bool finish_stdout() {
  errno = 0;
  if (std::fflush(stdout) == 0 && !std::ferror(stdout)) return true;
  std::fprintf(stderr, "lavin-native: error: standard output: %s\n", std::strerror(errno));
  return false;
}

int fail(const std::string& message, int code) {
  std::fprintf(stderr, "lavin-native: error: %s\n", lavin::one_line(message, 1500).c_str());
  return code;
}

}  // namespace

int main(int count, char** words) {
  // Standard streams that are closed lead nowhere: the next file opened would get their number.
  bool closed[3] = {};
  for (int descriptor = 0; descriptor < 3; ++descriptor) {
    closed[descriptor] = ::fcntl(descriptor, F_GETFD) < 0 && ::open("/dev/null", O_RDWR) == descriptor;
  }
  Options options;
  CLI::App app(kAbout, "lavin-native");
  try {
    add_options(app, options);
    app.parse(count, words);
    const at::NoGradGuard no_gradients;
    run(options);
    if (options.time && closed[STDOUT_FILENO]) return fail("standard output: it is closed, --time has no place", 2);
    return finish_stdout() ? 0 : 2;
  } catch (const CLI::Success& wanted) {
    app.exit(wanted);  // --help, --version
    return finish_stdout() ? 0 : 2;
  } catch (const CLI::ParseError& error) {
    return fail(error.what() + std::string("; see lavin-native --help"), 2);
  } catch (const InputError& error) {
    return fail(error.what(), 2);
  } catch (const c10::Error& error) {
    return fail(error.what_without_backtrace(), 1);
  } catch (const std::exception& error) {
    return fail(error.what(), 1);
  }
}
