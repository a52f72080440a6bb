// An aot-inductor artifact: its manifest, its compiled programs and the training state.
#pragma once

#include <sys/utsname.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <c10/core/GradMode.h>
#include <nlohmann/json.hpp>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/cuda.h>
#include <torch/version.h>

#include "safetensors.h"

namespace example {

using nlohmann::json;
using torch::inductor::AOTIModelPackageLoader;

class AotStep {
 public:
  explicit AotStep(const std::filesystem::path& folder) : folder_(folder) {
    std::ifstream file(folder / "manifest.json");
    if (!file) throw std::runtime_error(folder.string() + " holds no manifest.json");
    try {
      manifest_ = json::parse(file);
      check_manifest();
      for (const auto& spec : contract().at("hyper")) {
        const auto values = spec.at("defaults").get<std::vector<double>>();
        hyper_[spec.at("name")] = at::tensor(values, at::kDouble);
      }
      take(read_safetensors(folder / "state.safetensors"));
    } catch (const json::exception& error) {
      throw std::runtime_error(folder.string() + "/manifest.json is damaged: " + error.what());
    }
  }

  void set_hyper(const std::string& name, double value) {
    const auto found = hyper_.find(name);
    if (found == hyper_.end()) throw std::runtime_error("there is no hyper-parameter " + name);
    found->second.fill_(value);
  }

  std::int64_t step_count() const { return step_count_; }

  // Runs a program on the current state; `step` writes the new state over it.
  std::map<std::string, at::Tensor> run(const std::string& program,
                                        const std::vector<at::Tensor>& batch) {
    const auto& spec = find(contract().at("programs"), program);
    const auto inputs = spec.at("inputs").get<std::vector<std::string>>();
    const auto named = checked(inputs, batch, program == "step");
    std::vector<at::Tensor> given;
    for (const auto& name : inputs) {
      if (state_.contains(name)) {
        given.push_back(state_.at(name));
      } else if (name.starts_with("hyper.")) {
        given.push_back(hyper_.at(name.substr(6)).to(device_));
      } else {
        given.push_back(named.at(name).to(device_).contiguous());
      }
    }
    const c10::AutoGradMode no_gradients(false);
    const auto outputs = loader(program).run(given);
    std::map<std::string, at::Tensor> results;
    std::size_t index = 0;
    for (const auto& output : spec.at("outputs")) {
      const std::string name = output.at("name");
      if (!spec.at("feeds").contains(name)) results[name] = outputs.at(index++);
    }
    if (program == "step") {
      if (manifest_.at("semantics").at("on_nonfinite") == "raise" &&
          !results.at("finite").item<bool>()) {
        throw std::runtime_error("the step is not finite; nothing was changed");
      }
      ++step_count_;
    }
    return results;
  }

  // A checkpoint that Session.save of sam_export would write, and Session.restore reads.
  void save(const std::filesystem::path& path) const {
    TensorFile file;
    for (const auto& spec : contract().at("state")) {
      const std::string name = spec.at("name");
      file.tensors[name] = state_.at(name).reshape(shape_of(spec));
    }
    json header = {{"format", 1},
                   {"step_count", step_count_},
                   {"optimizer", contract().at("optimizer")},
                   {"fingerprint", details().at("fingerprint")}};
    for (const auto& [name, values] : hyper_) {
      header["hyper"][name] = std::vector<double>(values.data_ptr<double>(),
                                                  values.data_ptr<double>() + values.numel());
    }
    file.metadata["sam_export.checkpoint"] = header.dump();
    write_safetensors(path, file);
  }

  void restore(const std::filesystem::path& path) {
    const auto file = read_safetensors(path);
    const auto found = file.metadata.find("sam_export.checkpoint");
    if (found == file.metadata.end()) throw std::runtime_error(path.string() + " is no checkpoint");
    const auto header = json::parse(found->second);
    if (header.at("format") != 1 || header.at("fingerprint") != details().at("fingerprint")) {
      throw std::runtime_error(path.string() + " is a checkpoint of another step or format");
    }
    const auto step_count = header.at("step_count").get<std::int64_t>();
    std::map<std::string, at::Tensor> hyper;
    for (const auto& [name, values] : hyper_) {
      const auto numbers = header.at("hyper").at(name).get<std::vector<double>>();
      hyper[name] = at::tensor(numbers, at::kDouble);
      if (hyper[name].sizes() != values.sizes()) {
        throw std::runtime_error(path.string() + " has another number of parameter groups");
      }
    }
    take(file);  // throws before it changes anything
    step_count_ = step_count;
    hyper_ = std::move(hyper);
  }

 private:
  std::filesystem::path folder_;
  json manifest_;
  at::Device device_ = at::kCPU;
  std::int64_t step_count_ = 0;
  std::map<std::string, at::Tensor> state_;
  std::map<std::string, at::Tensor> hyper_;
  std::map<std::string, std::unique_ptr<AOTIModelPackageLoader>> loaders_;

  const json& contract() const { return manifest_.at("contract"); }
  const json& details() const { return manifest_.at("details"); }

  static const json& find(const json& items, const std::string& name) {
    for (const auto& item : items) {
      if (item.at("name") == name) return item;
    }
    throw std::runtime_error("the artifact has no '" + name + "'");
  }

  static std::vector<std::int64_t> shape_of(const json& spec) {
    return spec.at("shape").get<std::vector<std::int64_t>>();
  }

  static at::ScalarType dtype_of(const json& spec) {
    static const std::map<std::string, at::ScalarType> known = {
        {"float32", at::kFloat}, {"float64", at::kDouble}, {"float16", at::kHalf},
        {"int64", at::kLong},    {"int32", at::kInt},      {"int16", at::kShort},
        {"int8", at::kChar},     {"uint8", at::kByte},     {"bool", at::kBool}};
    const auto found = known.find(spec.at("dtype").get<std::string>());
    if (found == known.end()) throw std::runtime_error("dtype of " + spec.dump());
    return found->second;
  }

  static std::string described(const at::Tensor& tensor) {
    std::ostringstream text;
    text << tensor.scalar_type() << tensor.sizes();
    return text.str();
  }

  void check_manifest() {
    if (manifest_.at("format") != 1) throw std::runtime_error("unknown format of the manifest");
    if (manifest_.at("target") != "aot-inductor") {
      throw std::runtime_error("this artifact is for target " + manifest_.at("target").dump());
    }
    for (const auto& [name, entry] : manifest_.at("files").items()) {
      const auto path = folder_ / name;
      if (!std::filesystem::exists(path) ||
          std::filesystem::file_size(path) != entry.at("bytes").get<std::uint64_t>()) {
        throw std::runtime_error(path.string() + " is missing or cut off");
      }
    }
    check_machine(details().at("machine"));
  }

  // Compiled code crashes on a CPU that lacks an instruction; so ask first.
  void check_machine(const json& built_for) {
    utsname here{};
    uname(&here);
    const std::string torch_version = std::to_string(TORCH_VERSION_MAJOR) + "." +
                                      std::to_string(TORCH_VERSION_MINOR) + "." +
                                      std::to_string(TORCH_VERSION_PATCH);
    const auto require = [&](const char* key, const std::string& found) {
      if (built_for.at(key) != found) {
        throw std::runtime_error("the artifact was built for another machine: " +
                                 std::string(key) + " " + built_for.at(key).dump() +
                                 ", here it is " + found);
      }
    };
    require("system", here.sysname);
    require("architecture", here.machine);
    require("torch", torch_version);
    std::ifstream cpuinfo("/proc/cpuinfo");
    std::set<std::string> flags;
    for (std::string line; flags.empty() && std::getline(cpuinfo, line);) {
      if (!line.starts_with("flags") && !line.starts_with("Features")) continue;
      std::istringstream words(line.substr(line.find(':') + 1));
      for (std::string word; words >> word;) flags.insert(word);
    }
    for (const auto& needed : built_for.at("instruction_set")) {
      if (!flags.contains(needed)) {
        throw std::runtime_error("the artifact was built for another machine: this CPU lacks " +
                                 needed.get<std::string>());
      }
    }
    if (built_for.at("device") == "cuda") {
      if (!torch::cuda::is_available()) throw std::runtime_error("there is no CUDA device here");
      device_ = at::kCUDA;
    }
  }

  void take(const TensorFile& file) {
    std::map<std::string, at::Tensor> taken;
    for (const auto& spec : contract().at("state")) {
      const std::string name = spec.at("name");
      const auto& value = file.at(name);
      const auto shape = shape_of(spec);
      if (value.sizes().vec() != shape || value.scalar_type() != dtype_of(spec)) {
        throw std::runtime_error("'" + name + "' is " + described(value) + ", expected " +
                                 spec.at("dtype").get<std::string>() + spec.at("shape").dump());
      }
      // Compiled programs take a scalar as a vector of one element.
      taken[name] = value.reshape(shape.empty() ? std::vector<std::int64_t>{1} : shape).to(device_);
    }
    state_ = std::move(taken);
  }

  // Compiled code reads memory as the contract says it lies: nothing else may reach it.
  std::map<std::string, at::Tensor> checked(const std::vector<std::string>& inputs,
                                            const std::vector<at::Tensor>& batch,
                                            bool training) const {
    std::map<std::string, at::Tensor> named;
    std::map<std::string, std::int64_t> sizes;
    std::size_t index = 0;
    for (const auto& spec : contract().at("batch")) {
      const std::string name = spec.at("name");
      if (std::find(inputs.begin(), inputs.end(), name) == inputs.end()) continue;
      if (index == batch.size()) throw std::runtime_error("the batch lacks '" + name + "'");
      const auto& tensor = batch[index++];
      const auto& shape = spec.at("shape");
      bool fits = tensor.scalar_type() == dtype_of(spec) &&
                  tensor.dim() == static_cast<std::int64_t>(shape.size());
      for (std::size_t d = 0; fits && d < shape.size(); ++d) {
        const auto size = tensor.size(static_cast<std::int64_t>(d));
        if (shape[d].is_number()) {
          fits = shape[d] == size;
          continue;
        }
        const std::int64_t least = contract().at("dims").at(shape[d]);
        const auto [known, added] = sizes.emplace(shape[d], size);
        fits = known->second == size && size >= (training ? least : std::min<std::int64_t>(1, least));
      }
      if (!fits) {
        throw std::runtime_error("batch tensor '" + name + "' is " + described(tensor) +
                                 ", expected " + spec.at("dtype").get<std::string>() +
                                 shape.dump() + ", the same sizes in all of the batch");
      }
      named[name] = tensor;
    }
    if (index != batch.size()) throw std::runtime_error("the batch has too many tensors");
    return named;
  }

  AOTIModelPackageLoader& loader(const std::string& program) {
    auto& held = loaders_[program];
    if (!held) {
      for (const auto& [name, entry] : manifest_.at("files").items()) {
        const auto programs = entry.at("programs").get<std::vector<std::string>>();
        if (std::find(programs.begin(), programs.end(), program) == programs.end()) continue;
        held = std::make_unique<AOTIModelPackageLoader>((folder_ / name).string());
      }
    }
    if (!held) throw std::runtime_error("the artifact has no program '" + program + "'");
    return *held;
  }
};

}  // namespace example
