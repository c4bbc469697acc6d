// load_engine ENGINE.plan: opens an engine and prints its inputs and outputs. The plugin is inside the plan, so there is
// nothing else to load; that is also why a plan can run code of its author: open only plans that you trust.
//
//   g++ -std=c++17 load_engine.cpp -I$TENSORRT_INCLUDE_DIR -I$CUDA_HOME/include -L$CUDA_HOME/lib64 \
//       -l:libtensorrt_rtx.so.1 -lcudart -o load_engine            (mainline TensorRT: -lnvinfer)
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <vector>

struct Logger : nvinfer1::ILogger {
  void log(Severity severity, char const* text) noexcept override {
    if (severity <= Severity::kWARNING) std::cerr << text << '\n';
  }
};

int main(int argc, char** argv) {
  if (argc != 2) return std::cerr << "usage: load_engine ENGINE.plan\n", 2;
  std::ifstream file(argv[1], std::ios::binary);
  const std::vector<char> plan{std::istreambuf_iterator<char>(file), {}};
  if (plan.empty()) return std::cerr << argv[1] << " cannot be read\n", 2;

  // TensorRT-RTX 1.7 crashes in deserializeCudaEngine where there is no GPU, so ask first.
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return std::cerr << "there is no CUDA device\n", 3;
  Logger logger;
  const std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
  if (!runtime) return std::cerr << "TensorRT could not be started\n", 3;
  runtime->setEngineHostCodeAllowed(true);  // the plugin inside
  const std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime->deserializeCudaEngine(plan.data(), plan.size()));
  if (!engine) return std::cerr << "this TensorRT or GPU does not take the plan\n", 2;
  for (int i = 0; i < engine->getNbIOTensors(); i++) {
    const char* const name = engine->getIOTensorName(i);
    const nvinfer1::Dims shape = engine->getTensorShape(name);
    std::cout << name << " [";
    for (int d = 0; d < shape.nbDims; d++) std::cout << (d ? ", " : "") << shape.d[d];
    std::cout << "]\n";
  }
  return 0;
}
