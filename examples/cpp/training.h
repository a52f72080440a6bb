// What both programs share: options, data, the learning-rate schedule, the loop over epochs.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <map>
#include <numbers>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <ATen/Parallel.h>
#include <torch/csrc/jit/runtime/jit_exception.h>

#include "safetensors.h"

namespace example {

// A loaded SAM step.
class Trainee {
 public:
  virtual ~Trainee() = default;
  virtual void set_lr(double lr) = 0;
  // One SAM step in place; the loss at the weights before it.
  virtual double step(const at::Tensor& x, const at::Tensor& y) = 0;
  // The model's logits in eval mode.
  virtual at::Tensor evaluate(const at::Tensor& x) = 0;
  // Steps that were run, in earlier processes too.
  virtual std::int64_t step_count() = 0;
  // Everything that a restart needs.
  virtual void save(const std::string& path) = 0;
};

using Options = std::map<std::string, std::string>;

// "--name value" pairs; every name must be one of `known`.
inline Options parse(int argc, char** argv, const Options& known) {
  Options options = known;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (!known.contains(name)) throw std::runtime_error("unknown option " + name);
    if (i + 1 == argc) throw std::runtime_error(name + " needs a value");
    options[name] = argv[i + 1];
  }
  for (const auto& [name, value] : options) {
    if (value == "?") throw std::runtime_error(name + " is missing");
  }
  return options;
}

// The number that an option holds.
inline double number(const Options& options, const std::string& name) {
  const std::string& text = options.at(name);
  std::size_t used = 0;
  double value = 0;
  try {
    value = std::stod(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (text.empty() || used != text.size() || !(value >= 0 && value < 1e9)) {
    throw std::runtime_error(name + " " + text + ": expected a number that is not negative");
  }
  return value;
}

inline std::int64_t count(const Options& options, const std::string& name) {
  return static_cast<std::int64_t>(number(options, name));
}

// The options of both programs, with their defaults; "?" must be given.
inline Options common_options() {
  return {{"--data", "?"},   {"--out", "?"},  {"--epochs", "4"},  {"--stop-after", "0"},
          {"--batch-size", "64"}, {"--lr", "0.03"}, {"--threads", "1"}};
}

// Order of the examples in one epoch: Fisher-Yates, drawn from std::mt19937(epoch).
inline at::Tensor order_of(std::int64_t count, std::int64_t epoch) {
  auto order = at::arange(count, at::kLong);
  auto* values = order.data_ptr<std::int64_t>();
  std::mt19937 generator(static_cast<std::uint32_t>(epoch));
  for (std::int64_t i = count - 1; i > 0; --i) {
    std::swap(values[i], values[generator() % static_cast<std::uint64_t>(i + 1)]);
  }
  return order;
}

inline double accuracy(Trainee& trainee, const at::Tensor& x, const at::Tensor& y) {
  return trainee.evaluate(x).argmax(1).eq(y).to(at::kDouble).mean().item<double>();
}

// Trains from wherever the trainee stands to the end of --epochs, or of --stop-after epochs.
inline void train(Trainee& trainee, const Options& options) {
  const auto data = read_safetensors(options.at("--data"));
  const auto train_x = data.at("train_x"), train_y = data.at("train_y");
  const auto test_x = data.at("test_x"), test_y = data.at("test_y");
  const std::int64_t epochs = count(options, "--epochs");
  const std::int64_t stop = count(options, "--stop-after");
  const std::int64_t size = count(options, "--batch-size");
  const double lr = number(options, "--lr");
  if (size < 1 || train_x.size(0) < 1) throw std::runtime_error("a batch needs an example");
  const std::int64_t steps = (train_x.size(0) + size - 1) / size;
  if (trainee.step_count() % steps != 0) {
    throw std::runtime_error("the save is from the middle of an epoch of another batch size");
  }
  const std::int64_t last = stop > 0 ? std::min(stop, epochs) : epochs;
  for (std::int64_t epoch = trainee.step_count() / steps; epoch < last; ++epoch) {
    const auto order = order_of(train_x.size(0), epoch);
    double sum = 0;
    for (std::int64_t i = 0; i < steps; ++i) {
      const auto chosen = order.slice(0, i * size, (i + 1) * size);
      const double done = static_cast<double>(epoch * steps + i) / (epochs * steps);
      trainee.set_lr(lr * 0.5 * (1 + std::cos(std::numbers::pi * done)));
      sum += trainee.step(train_x.index_select(0, chosen), train_y.index_select(0, chosen));
    }
    std::printf("epoch %ld/%ld: loss %.6f, test accuracy %.2f %%\n", epoch + 1, epochs,
                sum / steps, 100 * accuracy(trainee, test_x, test_y));
    std::fflush(stdout);
  }
  trainee.save(options.at("--out"));
  std::printf("saved %s after %ld steps\n", options.at("--out").c_str(), trainee.step_count());
}

// The last line of a message: torch puts a traceback before it.
inline std::string last_line(std::string text) {
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text.substr(text.find_last_of('\n') + 1);
}

// Runs `body`; an error becomes one line and the exit status 1.
template <typename Body>
int reporting_errors(Body body) {
  try {
    body();
    return 0;
  } catch (const torch::jit::JITException& error) {
    const auto message = error.getOriginalMsg();
    std::fprintf(stderr, "error: %s\n", last_line(message ? *message : error.what()).c_str());
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "error: %s\n", last_line(error.what_without_backtrace()).c_str());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", last_line(error.what()).c_str());
  }
  return 1;
}

}  // namespace example
