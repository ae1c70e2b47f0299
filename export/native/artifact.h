// An artifact's folder: its manifest, and the hashes of its files.
#pragma once

#include <ATen/ATen.h>

#include <string>
#include <vector>

#include "files.h"
#include "json.h"

namespace lavin {

struct Manifest {
  // Reads and checks a folder's manifest; opens no other file.
  // Throws InputError: no manifest, another format, version or kind, or one that contradicts itself.
  static Manifest read(const fs::path& folder);

  // Compares every file with its size and hash; throws InputError for the first that is missing or another one.
  void check_files() const;

  // Throws InputError where the artifact was made for another kind of device, another GPU or another torch.
  void check_target(at::Device device) const;

  fs::path folder;
  Json values;
  at::ScalarType dtype = at::kFloat;
  std::string vae_fingerprint;
  double latent_shift = 0, latent_scale = 1;
  int64_t size = 512;  // of the pictures that the checkpoint was trained on
  std::vector<int64_t> schedules;
};

// The scalar type of a dtype's name; throws InputError for one that no artifact has.
at::ScalarType scalar_type(const std::string& name);

}  // namespace lavin
