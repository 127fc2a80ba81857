// hello.cpp - the header in C++11: a handle that destroys itself, an error that is thrown
//
//     c++ -std=c++11 -o hello_cpp examples/ffi/hello.cpp -lpthread && ./hello_cpp tests/golden/mixtral 0
#define MOE_IMPLEMENTATION
#include "../../moe.h"
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <vector>

struct destroy {
    void operator()(moe_checkpoint *p) const { moe_checkpoint_close(p); }
    void operator()(moe_context *p) const { moe_context_destroy(p); }
    void operator()(moe_weights *p) const { moe_weights_destroy(p); }
    void operator()(moe_plan *p) const { moe_plan_destroy(p); }
};
template <typename T> using owned = std::unique_ptr<T, destroy>;

// Calls f(args..., &handle, &err) and owns the handle.
template <typename T, typename F> owned<T> make(F f)
{
    moe_error err;
    T *handle = nullptr;
    if (f(&handle, &err) != MOE_OK) throw std::runtime_error(err.text);
    return owned<T>(handle);
}

static void run(const char *folder, int32_t index)
{
    const int32_t tokens = 4;
    moe_error err;
    moe_layer_desc layer;
    moe_plan_desc desc = {};
    moe_plan_info info = {};
    desc.max_tokens = tokens;
    desc.x_dtype = MOE_DTYPE_F32;
    auto ckpt = make<moe_checkpoint>([&](moe_checkpoint **p, moe_error *e) {
        return moe_checkpoint_open(folder, nullptr, p, e);
    });
    if (moe_checkpoint_layer(ckpt.get(), index, &layer, &err)) throw std::runtime_error(err.text);
    auto ctx = make<moe_context>([](moe_context **p, moe_error *e) { return moe_context_create(nullptr, p, e); });
    auto weights = make<moe_weights>([&](moe_weights **p, moe_error *e) {
        return moe_weights_from_checkpoint(ctx.get(), ckpt.get(), &layer, p, e);
    });
    auto plan = make<moe_plan>([&](moe_plan **p, moe_error *e) {
        return moe_plan_create(ctx.get(), &layer, &desc, p, e);
    });
    if (moe_plan_get_info(plan.get(), &info, &err)) throw std::runtime_error(err.text);

    std::vector<float> x(size_t(tokens * layer.hidden_size), 1.0f), out(x.size());
    std::vector<float> logits(size_t(tokens * info.router_width));
    std::vector<char> workspace(size_t(info.workspace_bytes) + 256);
    moe_execute_args args = {};
    args.input_mode = MOE_INPUT_LOGITS;
    args.num_tokens = tokens;
    args.x = x.data();
    args.logits = logits.data();
    args.out = out.data();
    args.workspace = workspace.data() + (256 - uintptr_t(workspace.data()) % 256) % 256;
    args.workspace_bytes = info.workspace_bytes;
    if (moe_router_logits(plan.get(), weights.get(), &args, logits.data(), nullptr) ||
        moe_execute(plan.get(), weights.get(), &args, nullptr)) throw std::runtime_error("moe_execute failed");
    std::printf("output %.5f %.5f ...\n", double(out[0]), double(out[1]));
}

int main(int argc, char **argv)
{
    try {
        run(argc > 1 ? argv[1] : "tests/golden/mixtral", argc > 2 ? std::atoi(argv[2]) : 0);
    } catch (const std::exception &e) {
        std::fprintf(stderr, "%s\n", e.what());
        return 1;
    }
    return 0;
}
