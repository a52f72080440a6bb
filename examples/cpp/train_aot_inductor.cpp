// Trains from an aot-inductor artifact: compiled programs, the state beside them.
//
//   train_aot_inductor --artifact build/digits --data digits.safetensors --out run.safetensors
//
// To go on from a save: --restart run.safetensors.

#include "aot_step.h"
#include "training.h"

namespace {

class CompiledStep : public example::Trainee {
 public:
  explicit CompiledStep(const std::string& folder) : step_(folder) {}

  void restore(const std::string& path) { step_.restore(path); }

  void set_lr(double lr) override { step_.set_hyper("lr", lr); }

  double step(const at::Tensor& x, const at::Tensor& y) override {
    return step_.run("step", {x, y}).at("loss").item<double>();
  }

  at::Tensor evaluate(const at::Tensor& x) override {
    return step_.run("evaluate", {x}).at("output");
  }

  std::int64_t step_count() override { return step_.step_count(); }

  void save(const std::string& path) override { step_.save(path); }

 private:
  example::AotStep step_;
};

}  // namespace

int main(int argc, char** argv) {
  return example::reporting_errors([&] {
    auto known = example::common_options();
    known["--artifact"] = "?";
    known["--restart"] = "";
    const auto options = example::parse(argc, argv, known);
    at::set_num_threads(std::max<int>(1, example::count(options, "--threads")));
    CompiledStep step(options.at("--artifact"));
    if (!options.at("--restart").empty()) step.restore(options.at("--restart"));
    example::train(step, options);
  });
}
