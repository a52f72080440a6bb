// Trains from step.pt, a scripted module that holds the training state itself.
//
//   train_torchscript --step build/digits/step.pt --data digits.safetensors --out trained.pt
//
// To go on from a save, give it as --step: it holds weights, slots and the number of steps.

#include <torch/script.h>

#include "training.h"

namespace {

class ScriptedStep : public example::Trainee {
 public:
  explicit ScriptedStep(const std::string& path) : module_(torch::jit::load(path)) {}

  void set_lr(double lr) override { module_.run_method("set_hyper", "lr", lr); }

  double step(const at::Tensor& x, const at::Tensor& y) override {
    return module_.forward({x, y}).toTensor().item<double>();
  }

  at::Tensor evaluate(const at::Tensor& x) override {
    return module_.run_method("evaluate", x).toTensor();
  }

  std::int64_t step_count() override { return module_.attr("step_count").toInt(); }

  void save(const std::string& path) override {
    module_.save(path + ".partial");
    std::filesystem::rename(path + ".partial", path);
  }

 private:
  torch::jit::Module module_;
};

}  // namespace

int main(int argc, char** argv) {
  return example::reporting_errors([&] {
    auto known = example::common_options();
    known["--step"] = "?";
    const auto options = example::parse(argc, argv, known);
    at::set_num_threads(std::max<int>(1, example::count(options, "--threads")));
    ScriptedStep step(options.at("--step"));
    example::train(step, options);
  });
}
