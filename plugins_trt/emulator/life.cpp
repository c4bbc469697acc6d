// life PLUGIN CASE [CHANGE...]: one plugin's whole life as TensorRT drives it, on the CUDA runtime stand-in, or, compiled
// by nvcc, on a GPU:
// create for building -> ask -> serialize -> create for running -> attach -> shapes -> enqueue -> destroy.
//
// A CHANGE breaks one thing on the way: drop=FIELD, FIELD=VALUE, columns=K, words=S:COUNT, inputs=COUNT.
// Prints what the plugin logs; exits with 0 when Y was written to CASE.out, 3 when the plugin refused.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "cases.h"
#ifdef __CUDACC__
#include "gpu.cuh"
#else
// The stand-in's GPU reads the CPU's memory.
const void* to_gpu(const void* host, size_t) { return host; }
void from_gpu(void*, const void*, size_t) {}
#endif

using namespace nvinfer1;

namespace {

struct Logger final : ILogger, ILoggerFinder {
  void log(Severity, AsciiChar const* text) noexcept override { std::printf("%s\n", text); }
  ILogger* findLogger() override { return this; }
} logger;

[[noreturn]] void refused(const char* where) {
  std::printf("refused: %s\n", where);
  std::exit(3);
}

void expect(bool fact, const char* what) {
  if (fact) return;
  std::printf("wrong: %s\n", what);
  std::exit(4);
}

constexpr const char* kLayouts[] = {"any", "bank32", "fixed8"};
constexpr const char* kTypes[] = {"f16", "bf16"};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  std::map<std::string, std::string> change;
  for (int i = 3; i < argc; i++) change[std::string(argv[i]).substr(0, std::strcspn(argv[i], "="))] = std::strchr(argv[i], '=') + 1;
  const CaseFile c(argv[2]);
  if (!c.good) return 1;
  const Header& h = c.h;

  void* const library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) return std::printf("%s\n", dlerror()), 1;
  auto get_creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"))(&logger);
  int32_t count = 0;
  auto* const creator = static_cast<IPluginCreatorV3One*>(get_creators(count)[0]);
  expect(count == 1, "one creator");
  expect(!std::strcmp(creator->getPluginName(), "LowRankSparseLinear") && !std::strcmp(creator->getPluginVersion(), "1") && !std::strcmp(creator->getPluginNamespace(), "sslc"), "name");

  // The fields that the parser would make of the node's attributes.
  using Numbers = std::vector<int32_t>;
  std::map<std::string, Numbers> numbers{{"out_features", Numbers(h.N, h.N + h.parts)}, {"in_features", {h.K}},
                                         {"rank", Numbers(h.rank, h.rank + h.parts)}, {"slot", {h.slot}}, {"version", {1}}};
  std::map<std::string, std::string> texts{{"layout", kLayouts[h.layout]}, {"type", kTypes[h.type]}, {"values", h.int8 ? "int8" : "float"}};
  for (auto& [name, value] : change) {
    if (numbers.count(name)) numbers[name][0] = std::atoi(value.c_str());
    if (texts.count(name)) texts[name] = value;
  }
  numbers.erase(change["drop"]), texts.erase(change["drop"]);
  if (change.count("also")) numbers[change["also"]].push_back(1);
  std::vector<PluginField> fields;
  for (auto& [name, value] : numbers) fields.push_back({name.c_str(), value.data(), PluginFieldType::kINT32, static_cast<int32_t>(value.size())});
  for (auto& [name, value] : texts) fields.push_back({name.c_str(), value.c_str(), PluginFieldType::kCHAR, static_cast<int32_t>(value.size() + 1)});
  const PluginFieldCollection given{static_cast<int32_t>(fields.size()), fields.data()};
  IPluginV3* const built = creator->createPlugin("layer", &given, TensorRTPhase::kBUILD);
  if (!built) refused("createPlugin");

  // Building: types, formats, workspace.
  const DataType type = h.f32 ? DataType::kFLOAT : h.type == 0 ? DataType::kHALF : DataType::kBF16;
  const int outputs = h.parts, all = 5 + outputs;
  DynamicPluginTensorDesc tensors[8]{};
  PluginTensorDesc now[8]{};
  const int32_t words[] = {0, h.bytes[1] / 4, h.bytes[2] / 4, h.bytes[3] / 4, h.bytes[4] / 4};
  for (int i = 0; i < all; i++) {
    PluginTensorDesc& d = now[i];
    d.format = TensorFormat::kLINEAR;
    d.type = i == 0 || i >= 5 ? type : i == 4 ? DataType::kFLOAT : DataType::kINT32;
    if (i == 0 || i >= 5) d.dims = Dims{3, {1, h.M, i ? h.N[i - 5] : h.K}};
    else d.dims = Dims{1, {words[i]}};
    if (i == 0 && change.count("columns")) d.dims.d[2] = std::atoi(change["columns"].c_str());
    if (i == 1 && change.count("words")) d.dims.d[0] = std::atoi(change["words"].c_str());
    tensors[i].desc = d, tensors[i].min = tensors[i].max = tensors[i].opt = d.dims;
  }
  const int inputs = change.count("inputs") ? std::atoi(change["inputs"].c_str()) : 5;
  auto* const build = static_cast<IPluginV3OneBuild*>(built->getCapabilityInterface(PluginCapabilityType::kBUILD));
  expect(build->getNbOutputs() == outputs, "one output per part");
  DataType in_types[5], out_types[3]{};
  for (int i = 0; i < 5; i++) in_types[i] = now[i].type;
  if (build->getOutputDataTypes(out_types, outputs, in_types, inputs)) refused("getOutputDataTypes");
  for (int i = 0; i < outputs; i++) expect(out_types[i] == type, "the output has the type of X");
  for (int at = 0; at < all; at++) {
    expect(build->supportsFormatCombination(at, tensors, 5, outputs), "its own types are supported");
    for (DataType other : {DataType::kINT8, DataType::kHALF, DataType::kBF16, DataType::kFLOAT, DataType::kINT32, DataType::kINT64}) {
      const bool right = at == 0 ? other == DataType::kFLOAT || other == (h.type ? DataType::kBF16 : DataType::kHALF) : other == now[at].type;
      tensors[at].desc.type = other;
      expect(build->supportsFormatCombination(at, tensors, 5, outputs) == right, "exactly the documented types are supported");
    }
    tensors[at].desc.type = now[at].type;
  }
  if (build->configurePlugin(tensors, inputs, tensors + 5, outputs)) refused("configurePlugin");
  const size_t workspace_bytes = build->getWorkspaceSize(tensors, 5, tensors + 5, outputs);

  // Into a plan and out of it.
  auto* const runtime = static_cast<IPluginV3OneRuntime*>(built->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  IPluginV3* const loaded = creator->createPlugin("layer", runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
  if (!loaded) refused("createPlugin of the serialized fields");
  IPluginV3* const copy = loaded->clone();
  delete loaded;
  IPluginV3* const attached = static_cast<IPluginV3OneRuntime*>(copy->getCapabilityInterface(PluginCapabilityType::kRUNTIME))->attachToContext(nullptr);
  if (!attached) refused("attachToContext");
  auto* const running = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  if (running->onShapeChange(now, 5, now + 5, outputs)) refused("onShapeChange");

  const auto y = poisoned(c.y_bytes()), scratch = poisoned(workspace_bytes);
  const void* in[5];
  for (int i = 0; i < 5; i++) in[i] = to_gpu(c.in[i].get(), h.bytes[i]);
  char* const results = static_cast<char*>(const_cast<void*>(to_gpu(y.get(), c.y_bytes())));
  void* const workspace = const_cast<void*>(to_gpu(scratch.get(), workspace_bytes));
  void* out[3];
  for (int i = 0; i < outputs; i++) out[i] = results + c.y_bytes(i);
  if (running->enqueue(now, now + 5, in, out, workspace, nullptr)) refused("enqueue");
  now[0].dims.d[1] = 0;
  expect(running->enqueue(now, now + 5, in, out, workspace, nullptr) == 0, "no tokens are no work");
  from_gpu(y.get(), results, c.y_bytes());
  write_output(argv[2], y.get(), c.y_bytes());
  delete attached;
  delete copy;
  delete built;
  auto launches = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "stand_in_launches"));
  std::printf("launches: %d\n", launches ? launches() : -1);
  return 0;
}
