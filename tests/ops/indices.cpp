// Tests the indices of the CUDA kernels on the host: the order of queries and sums, and offsets beyond 2^31 elements.
//
// Prints what is wrong and returns 1. Memory is reserved, but only pages in use exist: some 500 MB of up to 110 GB.
#include <sys/mman.h>

#include <random>

#include "deform_attn.cu"

namespace {

bool wrong = false;

void expect(bool right, const char* what) {
  if (!right) printf("%s\n", what);
  wrong |= !right;
}

DeformAttnProblem problem_of(int batch, const std::vector<std::pair<int, int>>& shapes) {
  DeformAttnProblem problem{};
  problem.batch = batch, problem.heads = 8, problem.channels = 32, problem.points = 4;
  for (auto [height, width] : shapes) {
    problem.level[problem.levels++] = {height, width, problem.tokens};
    problem.tokens += height * width;
  }
  problem.queries = problem.tokens, problem.value_dtype = problem.query_dtype = kFloat32;
  problem.value_token_stride = 256, problem.value_head_stride = 32, problem.value_batch_stride = problem.tokens * 256;
  return problem;
}

void check_order(const std::vector<std::pair<int, int>>& shapes) {
  DeformAttnProblem problem = problem_of(1, shapes);
  std::vector<bool> seen(problem.tokens);
  for (int position = 0; position < problem.tokens; ++position) {
    const int query = query_at(problem, position);
    const bool valid = query >= 0 && query < problem.tokens && !seen[query];
    expect(valid, "a query is outside, or processed twice");
    if (valid) seen[query] = true;
    for (int level = 0; level < problem.levels; ++level) {
      const int64_t start = problem.level[level].start;
      expect((query >= start) == (position >= start), "a query is processed among those of another level");
    }
  }
  problem.queries -= 1;  // not the pixels of the levels
  for (int position = 0; position < problem.queries; ++position) {
    expect(query_at(problem, position) == position, "other queries move");
  }
}

void check_tiles() {
  const DeformAttnProblem problem = problem_of(1, {{3, 5}, {20, 24}});
  for (int position = 0; position < 64; ++position) {
    const int pixel = query_at(problem, 15 + 2 * 64 + position) - 15;  // the third tile of the second level
    expect(pixel / 24 < 8 && pixel % 24 / 8 == 2, "64 positions are not a tile of 8 x 8 pixels");
  }
}

// One instruction adds four sums per lane.
template <typename C>
void check_sectors() {
  int sectors = 0;
  for (int first = 0; first < C::VECTOR; first += 4) {
    float sums[64] = {};
    for (int lane = 0; lane < C::GROUP; ++lane) {
      float x[C::VECTOR] = {};
      for (int c = first; c < first + 4; ++c) x[c] = 1;
      FloatingSums<C>{sums}.add(32, lane * C::VECTOR, x);
    }
    for (int sector = 0; sector < 8; ++sector) {
      float touched = 0;
      for (int i = 0; i < 8; ++i) touched += sums[8 * sector + i];
      sectors += touched > 0;
    }
  }
  expect(sectors == 4, "the sums of a pixel take more operations than it has sectors of 8 sums");
}

void check_last_sums() {
  DeformAttnProblem problem = problem_of(1, {{1, 3}});
  problem.heads = 1, problem.channels = 8, problem.value_dtype = problem.query_dtype = kBFloat16;
  DeformAttnGradients gradients{};
  gradients.value = &problem;
  expect(plan(problem, gradients).value_sums_bytes >= 4 * (first_four(16) + 20), "sums are not in the workspace");
}

// Memory of zeros for any number of elements.
template <typename T>
T* reserve(int64_t count) {
  void* memory = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) perror("mmap"), exit(2);
  return static_cast<T*>(memory);
}

struct Tensor {
  float* memory;
  int64_t each;  // elements of a batch element
  int batch;

  Tensor(int batch, int64_t each) : memory(reserve<float>(batch * each)), each(each), batch(batch) {}
  ~Tensor() { munmap(memory, batch * each * sizeof(float)); }
  float* last() const { return memory + (batch - 1) * each; }
  void fill(const Tensor* like) const {
    std::minstd_rand random(1);
    for (int64_t i = 0; i < each; ++i) last()[i] = like ? like->last()[i] : float(random() % 1000) / 1000;
  }
  bool equals(const Tensor& other) const { return !memcmp(last(), other.last(), each * sizeof(float)); }
};

struct Run {
  DeformAttnProblem problem;
  Tensor value, locations, weights, grad_output, output, of_value, of_locations, of_weights;

  explicit Run(const DeformAttnProblem& p)
      : problem(p), value(p.batch, p.tokens * 256), locations(p.batch, p.queries * 256),
        weights(p.batch, p.queries * 128), grad_output(p.batch, p.queries * 256), output(p.batch, p.queries * 256),
        of_value(p.batch, p.tokens * 256), of_locations(p.batch, p.queries * 256),
        of_weights(p.batch, p.queries * 128) {}

  // Runs the last block only.
  template <typename C>
  void forward_and_backward() {
    const int blocks = static_cast<int>(blocks_for_rows<C>(problem, problem.queries));
    const int queries = static_cast<int>(problem.queries);
    DeformAttnInputs inputs{};
    inputs.value = value.memory, inputs.locations = locations.memory, inputs.weights = weights.memory;
    DeformAttnGradients gradients{};
    gradients.value = of_value.memory;
    gradients.locations = of_locations.memory, gradients.weights = of_weights.memory;
    const Scratch<float> scratch{of_value.memory, nullptr, nullptr, nullptr};
    auto run = [&] {
      forward_kernel<C>(problem, inputs, output.memory);
      backward_kernel<C, false>(problem, inputs, grad_output.memory, gradients, scratch, queries);
    };
    for (int thread = 0; thread < kThreads; thread += emulation::kLanes) {
      emulation::position() = {blocks - 1, blocks, thread};
      emulation::warp().run([](void* data) { (*static_cast<decltype(run)*>(data))(); }, &run);
    }
  }
};

// The last batch element of many gives what it gives alone.
template <typename C>
void check_large(int batch) {
  const std::vector<std::pair<int, int>> shapes = {{256, 256}, {128, 128}, {64, 64}, {32, 32}};  // 1,024 x 1,024 pixels
  Run one(problem_of(1, shapes)), many(problem_of(batch, shapes));
  for (Tensor Run::*tensor : {&Run::value, &Run::locations, &Run::weights, &Run::grad_output}) {
    (one.*tensor).fill(nullptr);
    (many.*tensor).fill(&(one.*tensor));
  }
  one.forward_and_backward<C>();
  many.forward_and_backward<C>();
  const Tensor empty(1, one.output.each);
  for (Tensor Run::*tensor : {&Run::output, &Run::of_value, &Run::of_locations}) {
    expect(!(one.*tensor).equals(empty), "the last block wrote nothing");
    expect((one.*tensor).equals(many.*tensor), "a large batch differs");
  }
  expect(one.of_weights.equals(many.of_weights), "a large batch differs");
  expect(check(many.problem) == kNone, "a large batch is refused");
}

}  // namespace

int main() {
  check_order({{100, 167}, {50, 84}, {25, 42}, {13, 21}});
  check_order({{0, 0}, {1, 9}, {9, 1}, {0, 3}, {8, 8}, {17, 5}, {0, 0}});
  check_tiles();
  check_sectors<Cut<BFloat, 8, 4, 4, 4, false>>();
  check_sectors<Cut<Half, 8, 4, 0, 0, false>>();
  check_sectors<Cut<float, 4, 8, 4, 4, false>>();
  check_last_sums();
  for (int batch : {64, 192}) {  // 1.4 and 4.3 billion elements
    check_large<Cut<float, 4, 8, 4, 4, false>>(batch);
    check_large<Cut<float, 1, 8, 0, 0, false>>(batch);
  }
  return wrong;
}
