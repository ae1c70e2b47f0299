// Task contexts: folders of example pairs, the choice among them, and encoded contexts in files.
#pragma once

#include <ATen/ATen.h>

#include <string>
#include <vector>

#include "files.h"
#include "safetensors.h"

namespace lavin {

// An example of a task: what goes in and what should come out.
struct Pair {
  std::string name;
  fs::path input, target;
};

// The folder of a task: the folder given, else that of `templates` which has the name or, alone, begins with it.
// Throws InputError: neither, with the tasks there are, or a beginning that fits several.
fs::path find_task(const std::string& task, const fs::path& templates);

// `count` pairs of a folder of `*_input` and `*_target` pictures, chosen and ordered by seed as in Python.
// Throws InputError: no such folder, no pairs, a picture without its partner, two with one name, or too few.
std::vector<Pair> choose_pairs(const fs::path& folder, int64_t count, const std::string& seed);

// A context as the diffusion transformer reads it, encoded before.
struct EncodedContext {
  // Reads what `lavin-rt run --save-context` wrote.
  // Throws InputError: another kind of file, one of another VAE than `vae_fingerprint`, or one of clips.
  static EncodedContext load(const fs::path& path, const std::string& vae_fingerprint);
  static EncodedContext of(const Safetensors& file, const std::string& vae_fingerprint);

  at::Tensor latents;  // [1, 16, 2 * pairs, height / 8, width / 8], scaled
  int64_t height = 0, width = 0, pairs = 0;
};

// (height, width) from "512" or "384x640"; throws InputError unless both are positive multiples of 16.
std::pair<int64_t, int64_t> parse_size(const std::string& text);

// A whole number; throws InputError naming `what` where the text is none or outside of the bounds.
int64_t parse_integer(const std::string& text, const std::string& what, int64_t least, int64_t most);

}  // namespace lavin
