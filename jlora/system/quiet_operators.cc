// Jittor shows the progress of compiling operators on std::cerr, a few lines for each batch of
// them, whatever its log settings say. This shows one line that goes away at the end on a
// terminal, and nothing elsewhere. All other text passes.
#include <unistd.h>

#include <iostream>
#include <mutex>
#include <streambuf>
#include <string>

namespace {

const std::string PROGRESS = "Compiling Operators(";

// Jittor writes "\n", then for each change "Compiling Operators(I/N) used: ...s eta: ...s \r", and
// "\n" at the end; every item comes in a call of its own.
class Filter : public std::streambuf {
   public:
    explicit Filter(std::streambuf* target) : target_(target) {}

   protected:
    int_type overflow(int_type c) override {
        if (traits_type::eq_int_type(c, traits_type::eof())) return traits_type::not_eof(c);
        char one = traits_type::to_char_type(c);
        return xsputn(&one, 1) == 1 ? c : traits_type::eof();
    }

    std::streamsize xsputn(const char* text, std::streamsize size) override {
        std::lock_guard<std::mutex> lock(mutex_);
        const std::string piece(text, size);
        if (progress_) {
            // Anything else is somebody else's, such as what Jittor says of a segmentation fault.
            if (!is_progress(piece) || (open_ && piece == "\n")) {
                open_ = piece.back() != '\n';
                return target_->sputn(text, size);
            }
            take(piece);
            return size;
        }
        if (piece == PROGRESS) {
            held_ = false;
            progress_ = true;
            line_ = piece;
            return size;
        }
        release();
        held_ = piece == "\n";  // it may be the one before the progress
        return held_ ? size : target_->sputn(text, size);
    }

    int sync() override { return target_->pubsync(); }

   private:
    static bool is_progress(const std::string& piece) {
        for (const char* part : {"\n", " used: ", "s eta: ", "s \r", "inf", "nan"})
            if (piece == part) return true;
        return piece == PROGRESS || piece.find_first_not_of("0123456789.+-e/) ") == std::string::npos;
    }

    void release() {
        if (held_) target_->sputc('\n');
        held_ = false;
    }

    // A part of the progress; in "\n" it ends.
    void take(const std::string& piece) {
        const bool terminal = isatty(STDERR_FILENO);
        if (piece == "\n") {
            progress_ = false;
            if (terminal) put("\r\033[K");
            return;
        }
        line_ += piece;
        const size_t end = line_.find(')');
        if (line_.back() != '\r' || end == std::string::npos) return;
        const std::string count = line_.substr(PROGRESS.size(), end - PROGRESS.size());
        line_.clear();
        if (terminal) put("\r\033[Kjlora: compiling operators (once) ... " + count);
    }

    void put(const std::string& text) {
        target_->sputn(text.data(), text.size());
        target_->pubsync();
    }

    std::streambuf* target_;
    std::mutex mutex_;
    bool held_ = false, progress_ = false;
    bool open_ = false;  // somebody else's line has not ended
    std::string line_;
};

}  // namespace

// Called once a process. The filter stays to its end: other libraries write to std::cerr at exit.
extern "C" void jlora_quiet_operators() {
    static Filter* const filter = new Filter(std::cerr.rdbuf());
    std::cerr.rdbuf(filter);
}
