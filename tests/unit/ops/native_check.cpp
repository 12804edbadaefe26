// SPDX-License-Identifier: Apache-2.0
// A program that calls the native library through its C ABI only: every path must give the bits of the scalar one,
// for any number of threads, from several threads at once. Built and run by test_native_check.py, under sanitizers and
// for other processors.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <thread>
#include <vector>

#include "../../../csrc/api/ds_api.h"

namespace {

// xorshift: the same numbers everywhere.
uint32_t g_random = 2463534242u;
uint32_t random_bits() {
    g_random ^= g_random << 13;
    g_random ^= g_random >> 17;
    g_random ^= g_random << 5;
    return g_random;
}

typedef std::vector<unsigned char> Bytes;

// Random finite numbers of a dtype; 16-bit ones of both formats are small, whatever their bits mean.
Bytes numbers(int32_t dtype, int64_t n, bool positive) {
    Bytes out(n * (dtype == DS_F32 ? 4 : 2) + 1);
    for (int64_t i = 0; i < n; ++i) {
        const float f = (float)(random_bits() % 20001) / 10000 - (positive ? 0 : 1);
        uint32_t u;
        memcpy(&u, &f, 4);
        const uint16_t half =
            dtype == DS_BF16 ? (uint16_t)(u >> 16)
                             : (uint16_t)((random_bits() & (positive ? 0x3fff : 0xbfff)));
        if (dtype == DS_F32)
            memcpy(&out[i * 4], &f, 4);
        else
            memcpy(&out[i * 2], &half, 2);
    }
    return out;
}

struct Problem {
    int64_t n;
    int32_t p, s, g, low;
};

struct Result {
    Bytes param, first, second, low;
    double norm;

    bool operator==(const Result &o) const {
        return param == o.param && first == o.first && second == o.second && low == o.low &&
               memcmp(&norm, &o.norm, sizeof norm) == 0;
    }
};

int g_failures = 0;

void check(int status, const char *what) {
    if (status == DS_OK) return;
    printf("%s: %d %s\n", what, status, ds_last_error());
    ++g_failures;
}

Result solve(const Problem &problem, const Result &start, const Bytes &grad, uint32_t threads) {
    Result r = start;
    ds_adam_args adam = {};
    adam.size = sizeof adam;
    adam.threads = threads;
    adam.numel = problem.n;
    adam.param = r.param.data();
    adam.exp_avg = r.first.data();
    adam.exp_avg_sq = r.second.data();
    adam.grad = grad.data();
    adam.low = problem.low < 0 ? nullptr : r.low.data();
    adam.param_dtype = problem.p;
    adam.state_dtype = problem.s;
    adam.grad_dtype = problem.g;
    adam.low_dtype = problem.low < 0 ? 0 : problem.low;
    adam.decoupled = 1;
    adam.bias_correction = 1;
    adam.step = 3;
    adam.lr = 0.01;
    adam.beta1 = 0.9;
    adam.beta2 = 0.99;
    adam.eps = 1e-6;
    adam.decay = 0.1;
    adam.grad_scale = 0.5;
    check(ds_adam_step(&adam), "adam");

    ds_adagrad_args adagrad = {};
    adagrad.size = sizeof adagrad;
    adagrad.threads = threads;
    adagrad.numel = problem.n;
    adagrad.param = adam.param;
    adagrad.exp_avg_sq = adam.exp_avg_sq;
    adagrad.grad = adam.grad;
    adagrad.param_dtype = problem.p;
    adagrad.state_dtype = problem.s;
    adagrad.grad_dtype = problem.g;
    adagrad.lr = 0.01;
    adagrad.eps = 1e-6;
    adagrad.decay = 0.1;
    adagrad.grad_scale = 1;
    check(ds_adagrad_step(&adagrad), "adagrad");

    ds_lion_args lion = {};
    lion.size = sizeof lion;
    lion.threads = threads;
    lion.numel = problem.n;
    lion.param = adam.param;
    lion.exp_avg = adam.exp_avg;
    lion.grad = adam.grad;
    lion.low = adam.low;
    lion.param_dtype = problem.p;
    lion.state_dtype = problem.s;
    lion.grad_dtype = problem.g;
    lion.low_dtype = adam.low_dtype;
    lion.lr = 0.01;
    lion.beta1 = 0.3;
    lion.beta2 = 0.9;
    lion.decay = 0.1;
    lion.grad_scale = 1;
    check(ds_lion_step(&lion), "lion");

    ds_norm_args norm = {};
    norm.size = sizeof norm;
    norm.threads = threads;
    norm.numel = problem.n;
    norm.x = adam.param;
    norm.x_dtype = problem.p;
    norm.out = &r.norm;
    check(ds_squared_norm(&norm), "norm");
    return r;
}

}  // namespace

int main() {
    std::vector<std::string> paths;
    const char *list = ds_isa_list();
    for (const char *word = list; *word;) {
        const size_t length = strcspn(word, " ");
        paths.emplace_back(word, length);
        word += length + (word[length] == ' ');
    }
    const int64_t sizes[] = {0, 1, 15, 33, 70001};
    int compared = 0;
    for (int64_t n : sizes) {
        for (int mix = 0; mix < 27 * 4; ++mix) {
            if (mix % (n > 5000 ? 29 : 5)) continue;
            const Problem problem = {n, mix % 3, mix / 3 % 3, mix / 9 % 3, mix / 27 - 1};
            Result start = {numbers(problem.p, n, false), numbers(problem.s, n, false),
                            numbers(problem.s, n, true),
                            Bytes(n * (problem.low == DS_F32 ? 4 : 2)), 0};
            const Bytes grad = numbers(problem.g, n, false);
            ds_set_isa("scalar");
            const Result expected = solve(problem, start, grad, 1);
            if (!isfinite(expected.norm)) printf("not finite: size %lld\n", (long long)n), ++g_failures;
            for (const std::string &path : paths) {
                ds_set_isa(path.c_str());
                Result seen[3];
                seen[0] = solve(problem, start, grad, 1);
                seen[1] = solve(problem, start, grad, 3);
                std::thread other([&] { seen[2] = solve(problem, start, grad, 2); });
                const Result same_time = solve(problem, start, grad, 2);
                other.join();
                for (const Result &result : {seen[0], seen[1], seen[2], same_time}) {
                    ++compared;
                    if (result == expected) continue;
                    printf("%s differs: size %lld, mix %d\n", path.c_str(), (long long)n, mix);
                    ++g_failures;
                }
            }
        }
    }
    printf("paths %s: %d results compared, %d failures\n", list, compared, g_failures);
    return g_failures != 0;
}
