// Reads pictures as lavin-native does: read-pictures OUTPUT-FOLDER PICTURE...
// Writes every one as OUTPUT-FOLDER/<name>.ppm, or prints "<name>\t<why not>".

#include <cstdio>
#include <fstream>

#include "error.h"
#include "pictures.h"

int main(int count, char** words) {
  for (int i = 2; i < count; ++i) {
    const lavin::fs::path path = words[i];
    const std::string name = path.filename().string();
    try {
      const at::Tensor pixels = lavin::load_picture(path).permute({1, 2, 0}).contiguous();
      std::ofstream out(lavin::fs::path(words[1]) / (name + ".ppm"), std::ios::binary);
      out << "P6 " << pixels.size(1) << ' ' << pixels.size(0) << " 255\n";
      out.write(static_cast<const char*>(pixels.const_data_ptr()), pixels.numel());
    } catch (const lavin::InputError& error) {
      std::printf("%s\t%s\n", name.c_str(), error.what());
    }
  }
}
