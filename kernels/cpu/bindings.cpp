// The Python module: the C interface with addresses as integers. A tensor's address costs 0.1 microseconds; handing
// over the tensor itself costs 14. Calls that compute give up the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "flashmoe_cpu.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

struct Matrix : fm_matrix {
  Matrix(Address data_, int32_t format_, int32_t rows_, int32_t columns_)
      : fm_matrix{at<const void>(data_), format_, rows_, columns_} {}
};

struct Experts : fm_experts {
  Experts(int32_t hidden_, int32_t width_, int32_t format_, int32_t activation_, bool exact_, float limit_,
          float alpha_)
      : fm_experts{hidden_, width_, format_, activation_, exact_, limit_, alpha_} {}
};

struct Attention : fm_attention {
  Attention(int32_t hidden_, int32_t heads_, int32_t kv_heads_, int32_t head_dim_, int32_t qk_norm_, int32_t window_,
            bool exact_, float eps_, float clip_, Address input_norm_, const Matrix& qkv_, Address qkv_bias_,
            Address q_norm_, Address k_norm_, const Matrix& o_, Address o_bias_, Address keys_, Address values_)
      : fm_attention{hidden_, heads_, kv_heads_, head_dim_, qk_norm_, window_, exact_, eps_, clip_,
                     at<const float>(input_norm_), at<const float>(qkv_bias_), at<const float>(q_norm_),
                     at<const float>(k_norm_), at<const float>(o_bias_), qkv_, o_, at<float>(keys_),
                     at<float>(values_)} {}
};

struct Router : fm_router {
  Router(int32_t hidden_, int32_t experts_, int32_t top_k_, bool renormalise_, float eps_, Address norm_,
         Address weight_)
      : fm_router{hidden_, experts_, top_k_, renormalise_, eps_, at<const float>(norm_), at<const float>(weight_)} {}
};

struct Release {
  void operator()(fm_context* context) const { fm_destroy(context); }
};

class Context {
 public:
  Context(int32_t threads, const std::string& isa)
      : context_(fm_create(threads, isa.empty() ? nullptr : isa.c_str())) {
    if (!context_)
      throw std::invalid_argument("no kernels for " + isa + " on this machine; there are: " + fm_isa_names());
  }
  fm_context* get() const { return context_.get(); }

 private:
  std::unique_ptr<fm_context, Release> context_;
};

using NoGil = nb::call_guard<nb::gil_scoped_release>;

nb::tuple pack_result(const double* error) { return nb::make_tuple(error[0], error[1]); }

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "CPU kernels; see flashmoe_cpu.h. Addresses are integers, memory stays the caller's.";
  nb::set_leak_warnings(false);  // what is in a circle when the interpreter ends is freed with the process
  m.def("isa_names", [] { return std::string(fm_isa_names()); });
  m.def("packed_matrix_bytes", &fm_packed_matrix_bytes, "format"_a, "rows"_a, "columns"_a);
  m.def("packed_expert_bytes", &fm_packed_expert_bytes, "format"_a, "hidden"_a, "width"_a);
  m.def("unpack_matrix", [](const Matrix& packed, Address out) { fm_unpack_matrix(&packed, at<float>(out)); },
        "packed"_a, "out"_a, NoGil());
  m.def("unpack_expert",
        [](int32_t format, int64_t hidden, int64_t width, Address packed, Address gate, Address up, Address down) {
          fm_unpack_expert(format, hidden, width, at<const uint8_t>(packed), at<float>(gate), at<float>(up),
                           at<float>(down));
        },
        "format"_a, "hidden"_a, "width"_a, "packed"_a, "gate"_a, "up"_a, "down"_a, NoGil());
  m.def("gather_rows",
        [](const Matrix& matrix, Address ids, int64_t n, Address out) {
          fm_gather_rows(&matrix, at<const int64_t>(ids), n, at<float>(out));
        },
        "matrix"_a, "ids"_a, "n"_a, "out"_a, NoGil());

  nb::class_<Matrix>(m, "Matrix").def(nb::init<Address, int32_t, int32_t, int32_t>(), "data"_a, "format"_a, "rows"_a,
                                      "columns"_a);
  nb::class_<Experts>(m, "Experts")
      .def(nb::init<int32_t, int32_t, int32_t, int32_t, bool, float, float>(), "hidden"_a, "width"_a, "format"_a,
           "activation"_a, "exact"_a, "limit"_a = 7.f, "alpha"_a = 1.702f);
  nb::class_<Attention>(m, "Attention")
      .def(nb::init<int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, bool, float, float, Address, const Matrix&,
                    Address, Address, Address, const Matrix&, Address, Address, Address>(),
           "hidden"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "qk_norm"_a, "window"_a, "exact"_a, "eps"_a, "clip"_a,
           "input_norm"_a, "qkv"_a, "qkv_bias"_a, "q_norm"_a, "k_norm"_a, "o"_a, "o_bias"_a, "keys"_a, "values"_a);
  nb::class_<Router>(m, "Router")
      .def(nb::init<int32_t, int32_t, int32_t, bool, float, Address, Address>(), "hidden"_a, "experts"_a, "top_k"_a,
           "renormalise"_a, "eps"_a, "norm"_a, "weight"_a);

  nb::class_<Context>(m, "Context")
      .def(nb::init<int32_t, const std::string&>(), "threads"_a, "isa"_a = "")
      .def_prop_ro("isa", [](const Context& c) { return std::string(fm_isa(c.get())); })
      .def_prop_ro("busy_s", [](const Context& c) { return fm_busy_s(c.get()); })
      .def_prop_ro("workspace_bytes", [](const Context& c) { return fm_workspace_bytes(c.get()); })
      .def("linear",
           [](Context& c, const Matrix& w, Address bias, Address x, int64_t tokens, bool exact, Address y,
              int64_t y_step) {
             fm_linear(c.get(), &w, at<const float>(bias), at<const float>(x), tokens, exact, at<float>(y), y_step);
           },
           "matrix"_a, "bias"_a, "x"_a, "tokens"_a, "exact"_a, "y"_a, "y_step"_a, NoGil())
      .def("mlp",
           [](Context& c, int32_t activation, const Matrix& gate, const Matrix& up, const Matrix& down, Address x,
              int64_t tokens, bool exact, Address factor, Address y) {
             fm_mlp(c.get(), activation, &gate, &up, &down, at<const float>(x), tokens, exact,
                    at<const float>(factor), at<float>(y));
           },
           "activation"_a, "gate"_a, "up"_a, "down"_a, "x"_a, "tokens"_a, "exact"_a, "factor"_a, "y"_a, NoGil())
      .def("moe_begin",
           [](Context& c, const Experts& e, Address x, int64_t tokens, int32_t top_k) {
             fm_moe_begin(c.get(), &e, at<const float>(x), tokens, top_k);
           },
           "experts"_a, "x"_a, "tokens"_a, "top_k"_a, NoGil())
      .def("moe_experts",
           [](Context& c, Address table, int64_t n, Address row_begin, Address rows, Address products) {
             fm_moe_experts(c.get(), at<const void* const>(table), n, at<const int32_t>(row_begin),
                            at<const int32_t>(rows), at<float>(products));
           },
           "table"_a, "n"_a, "row_begin"_a, "rows"_a, "products"_a, NoGil())
      .def("moe_end",
           [](Context& c, Address products, Address weights, Address y) {
             fm_moe_end(c.get(), at<const float>(products), at<const float>(weights), at<float>(y));
           },
           "products"_a, "weights"_a, "y"_a, NoGil())
      // A layer whose experts are all resident: one call.
      .def("moe",
           [](Context& c, const Experts& e, Address x, int64_t tokens, int32_t top_k, Address table, int64_t n,
              Address row_begin, Address rows, Address products, Address weights, Address y) {
             fm_moe_begin(c.get(), &e, at<const float>(x), tokens, top_k);
             fm_moe_experts(c.get(), at<const void* const>(table), n, at<const int32_t>(row_begin),
                            at<const int32_t>(rows), at<float>(products));
             fm_moe_end(c.get(), at<const float>(products), at<const float>(weights), at<float>(y));
           },
           "experts"_a, "x"_a, "tokens"_a, "top_k"_a, "table"_a, "n"_a, "row_begin"_a, "rows"_a, "products"_a,
           "weights"_a, "y"_a, NoGil())
      .def("attend",
           [](Context& c, const Attention& a, Address cos, Address sin, Address sequences, int64_t n, Address x) {
             fm_attend(c.get(), &a, at<const float>(cos), at<const float>(sin), at<const fm_sequence>(sequences), n,
                       at<float>(x));
           },
           "attention"_a, "cos"_a, "sin"_a, "sequences"_a, "n"_a, "x"_a, NoGil())
      .def("route",
           [](Context& c, const Router& r, Address x, int64_t tokens, Address h, Address probabilities, Address ids,
              Address weights) {
             fm_route(c.get(), &r, at<const float>(x), tokens, at<float>(h), at<float>(probabilities),
                      at<int32_t>(ids), at<float>(weights));
           },
           "router"_a, "x"_a, "tokens"_a, "h"_a, "probabilities"_a, "ids"_a, "weights"_a, NoGil())
      .def("attend_and_route",  // one call for what comes before a layer's experts
           [](Context& c, const Attention& a, const Router& r, Address cos, Address sin, Address sequences, int64_t n,
              int64_t tokens, Address x, Address h, Address probabilities, Address ids, Address weights) {
             fm_attend(c.get(), &a, at<const float>(cos), at<const float>(sin), at<const fm_sequence>(sequences), n,
                       at<float>(x));
             fm_route(c.get(), &r, at<const float>(x), tokens, at<float>(h), at<float>(probabilities),
                      at<int32_t>(ids), at<float>(weights));
           },
           "attention"_a, "router"_a, "cos"_a, "sin"_a, "sequences"_a, "n"_a, "tokens"_a, "x"_a, "h"_a,
           "probabilities"_a, "ids"_a, "weights"_a, NoGil())
      .def("rms_norm",
           [](Context& c, Address x, Address weight, int64_t tokens, int64_t hidden, float eps, Address h) {
             fm_rms_norm(c.get(), at<const float>(x), at<const float>(weight), tokens, hidden, eps, at<float>(h));
           },
           "x"_a, "weight"_a, "tokens"_a, "hidden"_a, "eps"_a, "h"_a, NoGil())
      .def("pack_matrix",
           [](Context& c, const Matrix& source, int32_t format, Address importance, Address out) {
             double error[2] = {0, 0};
             {
               nb::gil_scoped_release release;
               fm_pack_matrix(c.get(), &source, format, at<const float>(importance), at<uint8_t>(out), error);
             }
             return pack_result(error);
           },
           "source"_a, "format"_a, "importance"_a, "out"_a,
           "Returns (sum of weighted squared errors, sum of weighted squares).")
      .def("pack_expert",
           [](Context& c, const Matrix& gate, const Matrix& up, const Matrix& down, int32_t format,
              Address importance_in, Address importance_hidden, Address out) {
             double error[2] = {0, 0};
             {
               nb::gil_scoped_release release;
               fm_pack_expert(c.get(), &gate, &up, &down, format, at<const float>(importance_in),
                              at<const float>(importance_hidden), at<uint8_t>(out), error);
             }
             return pack_result(error);
           },
           "gate"_a, "up"_a, "down"_a, "format"_a, "importance_in"_a, "importance_hidden"_a, "out"_a,
           "Returns (sum of weighted squared errors, sum of weighted squares).")
      .def("lay_out_matrix",
           [](Context& c, int32_t format, int64_t rows, int64_t columns, Address codes, Address scales, Address out) {
             fm_lay_out_matrix(c.get(), format, rows, columns, at<const int8_t>(codes), at<const uint16_t>(scales),
                               at<uint8_t>(out));
           },
           "format"_a, "rows"_a, "columns"_a, "codes"_a, "scales"_a, "out"_a, NoGil())
      .def("lay_out_expert",
           [](Context& c, int32_t format, int64_t hidden, int64_t width, Address gate, Address up, Address down,
              Address gate_scales, Address up_scales, Address down_scales, Address out) {
             const int8_t* codes[3] = {at<const int8_t>(gate), at<const int8_t>(up), at<const int8_t>(down)};
             const uint16_t* scales[3] = {at<const uint16_t>(gate_scales), at<const uint16_t>(up_scales),
                                          at<const uint16_t>(down_scales)};
             fm_lay_out_expert(c.get(), format, hidden, width, codes, scales, at<uint8_t>(out));
           },
           "format"_a, "hidden"_a, "width"_a, "gate"_a, "up"_a, "down"_a, "gate_scales"_a, "up_scales"_a,
           "down_scales"_a, "out"_a, NoGil());
}
