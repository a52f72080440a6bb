// Named tensors in a safetensors file: an eight-byte length, a JSON header, the raw data.
// Format: https://huggingface.co/docs/safetensors/index#format
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

namespace example {

inline const std::map<std::string, at::ScalarType>& dtypes() {
  static const std::map<std::string, at::ScalarType> known = {
      {"BOOL", at::kBool}, {"U8", at::kByte},   {"I8", at::kChar},   {"I16", at::kShort},
      {"I32", at::kInt},   {"I64", at::kLong},  {"F16", at::kHalf},  {"F32", at::kFloat},
      {"F64", at::kDouble}};
  return known;
}

struct TensorFile {
  std::map<std::string, at::Tensor> tensors;
  std::map<std::string, std::string> metadata;

  const at::Tensor& at(const std::string& name) const {
    const auto found = tensors.find(name);
    if (found == tensors.end()) throw std::runtime_error("there is no tensor '" + name + "'");
    return found->second;
  }
};

inline TensorFile read_safetensors(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path.string() + " cannot be opened");
  const std::uint64_t size = std::filesystem::file_size(path);
  const auto damaged = [&](const std::string& why) {
    return std::runtime_error(path.string() + " is damaged or no safetensors file: " + why);
  };
  std::uint64_t length = 0;
  if (!file.read(reinterpret_cast<char*>(&length), 8) || length > size - 8) {
    throw damaged("it is cut off");
  }
  std::string text(length, '\0');
  file.read(text.data(), static_cast<std::streamsize>(length));
  TensorFile result;
  try {
    const auto header = nlohmann::json::parse(text);
    for (const auto& [name, entry] : header.items()) {
      if (name == "__metadata__") {
        result.metadata = entry.get<std::map<std::string, std::string>>();
        continue;
      }
      const auto dtype = dtypes().find(entry.at("dtype").get<std::string>());
      if (dtype == dtypes().end()) throw damaged("dtype of '" + name + "'");
      const auto shape = entry.at("shape").get<std::vector<std::int64_t>>();
      const auto range = entry.at("data_offsets").get<std::vector<std::uint64_t>>();
      auto tensor = at::empty(shape, dtype->second);
      if (range.size() != 2 || range[1] < range[0] || range[1] - range[0] != tensor.nbytes() ||
          range[1] > size - 8 - length) {
        throw damaged("'" + name + "' lies outside of the file; it is cut off");
      }
      file.seekg(static_cast<std::streamoff>(8 + length + range[0]));
      if (!file.read(static_cast<char*>(tensor.data_ptr()),
                     static_cast<std::streamsize>(tensor.nbytes()))) {
        throw damaged("it is cut off");
      }
      result.tensors.emplace(name, tensor);
    }
  } catch (const nlohmann::json::exception& error) {
    throw damaged(error.what());
  }
  return result;
}

// Writes to a temporary name, waits for the disk, renames: a file that was there stays whole.
inline void write_safetensors(const std::filesystem::path& path, const TensorFile& content) {
  nlohmann::json header;
  if (!content.metadata.empty()) header["__metadata__"] = content.metadata;
  std::vector<at::Tensor> values;
  std::uint64_t offset = 0;
  for (const auto& [name, tensor] : content.tensors) {
    const auto value = tensor.detach().to(at::kCPU).contiguous();
    for (const auto& [code, dtype] : dtypes()) {
      if (dtype == value.scalar_type()) header[name]["dtype"] = code;
    }
    header[name]["shape"] = value.sizes().vec();
    header[name]["data_offsets"] = {offset, offset + value.nbytes()};
    offset += value.nbytes();
    values.push_back(value);
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  const std::uint64_t length = text.size();
  const auto partial = path.string() + ".partial";
  std::FILE* file = std::fopen(partial.c_str(), "wb");
  if (file == nullptr) throw std::runtime_error(partial + " cannot be written");
  bool good = std::fwrite(&length, 8, 1, file) == 1;
  good = std::fwrite(text.data(), 1, text.size(), file) == text.size() && good;
  for (const auto& value : values) {
    good = std::fwrite(value.data_ptr(), 1, value.nbytes(), file) == value.nbytes() && good;
  }
  good = std::fflush(file) == 0 && fsync(fileno(file)) == 0 && good;
  good = std::fclose(file) == 0 && good;
  if (!good) {
    std::remove(partial.c_str());
    throw std::runtime_error(path.string() + " cannot be written: is the disk full?");
  }
  std::filesystem::rename(partial, path);
}

}  // namespace example
