// An artifact's folder: its manifest, and the hashes of its files.
#pragma once

#include <ATen/ATen.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "files.h"

namespace lavin {

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

  // Throws InputError where the artifact was made for another kind of device, another GPU or another torch.
  void check_target(at::Device on) const;

  fs::path folder;
  std::string vae_fingerprint;
  double latent_shift = 0, latent_scale = 1;
  int64_t size = 512;  // of the pictures that the checkpoint was trained on
  std::vector<int64_t> schedules;
  std::map<std::string, Part> parts;
  std::map<std::string, FileEntry> files;
  std::string device, torch;        // that it was made for, and by
  std::vector<int64_t> capability;  // major, minor of the GPU; empty for any
};

}  // namespace lavin
