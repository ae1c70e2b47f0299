// An artifact's folder: its manifest, and the hashes of its files.
#pragma once

#include <ATen/ATen.h>

#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "files.h"

namespace lavin {

inline constexpr char kDenoiser[] = "denoiser";
inline constexpr char kKeptDenoiser[] = "denoiser_kept";  // takes and gives keys and values
inline constexpr size_t kKeys = 4;                        // which of its inputs are the keys; the values follow

// One of a shape's sizes: so many, or so many times the size of a name ("rows", "8*rows").
struct Dimension {
  int64_t multiple = 1;
  std::string name;
};

struct Input {
  std::string name;
  at::ScalarType dtype = at::kFloat;
  std::vector<Dimension> shape;
};

// The least and the most of the sizes by name.
using Ranges = std::map<std::string, std::pair<int64_t, int64_t>>;

// A compiled network: its files, and what it takes.
struct Part {
  std::string file, machine, cpu_level;
  std::vector<std::string> weights;
  std::vector<Input> inputs;
  std::vector<Ranges> ranges;  // of which one has to fit
};

// How often the network is evaluated along a run, and how much of it each time; as lavin_rt.sampling.speeds.Speed.
struct Speed {
  std::optional<int64_t> evaluations;
  std::optional<std::vector<double>> times;
  std::optional<std::set<int64_t>> refresh, guided;
  bool once_a_task = false;  // the pairs' keys and values, in place of `refresh`

  bool owns_grid() const { return evaluations || times; }
  bool keeps() const { return once_a_task || refresh; }
  // The evaluations of a grid of its own, else 0.
  int64_t count() const { return times ? static_cast<int64_t>(times->size()) - 1 : evaluations.value_or(0); }
  // Throws InputError for a set beyond a grid of so many evaluations.
  void check_sets(int64_t count) const;
};

struct FileEntry {
  int64_t bytes = 0;
  std::string sha256;
};

struct Manifest {
  // Reads and checks a folder's manifest; opens no other file.
  // Throws InputError: no manifest, another format, version or kind, or one that contradicts itself.
  static Manifest read(const fs::path& folder);
  // The same of a manifest's text; errors do not name the file.
  static Manifest parse(std::string_view text);

  // Compares every file with its size and hash; throws InputError for the first that is missing or another one.
  void check_files() const;

  // A speed by its name; throws InputError, with those there are, where there is none.
  const Speed& speed(const std::string& name) const;

  // Throws InputError where the artifact was made for another kind of device, another GPU or another torch.
  void check_target(at::Device on) const;

  fs::path folder;
  std::string vae_fingerprint;
  double latent_shift = 0, latent_scale = 1;
  int64_t size = 512;  // of the pictures that the checkpoint was trained on
  std::vector<int64_t> schedules;
  std::map<std::string, Speed> speeds;  // "exact" always among them
  std::map<std::string, Part> parts;
  std::map<std::string, FileEntry> files;
  std::string device, torch;        // that it was made for, and by
  std::vector<int64_t> capability;  // major, minor of the GPU; empty for any
};

}  // namespace lavin
