package stdio

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"sync"
)

// A Reader reads lines in bounded memory, [MaxLine] bytes (LIFE-10). It is not
// safe for concurrent use.
type Reader struct {
	r   *bufio.Reader
	err error
}

// NewReader returns a Reader of r. The Reader buffers: nobody else can read r.
func NewReader(r io.Reader) *Reader { return &Reader{r: bufio.NewReaderSize(r, MaxLine)} }

// ReadLine returns the next line without its LF, valid until the next call. A
// line that is too long is skipped whole and reported by [ErrTooLong]: nothing
// after it is lost, and reading goes on (LINE-1). Any other error is the end of
// the stream and comes again with every call: [io.EOF] after a whole line, and
// [io.ErrUnexpectedEOF] when the last one was cut off, which is dropped since
// the rest of its meaning is not known.
func (r *Reader) ReadLine() ([]byte, error) {
	if r.err != nil {
		return nil, r.err
	}
	line, err := r.r.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		for errors.Is(err, bufio.ErrBufferFull) {
			_, err = r.r.ReadSlice('\n')
		}
		r.err = err
		return nil, ErrTooLong
	}
	if err != nil {
		r.err = endOf(line, err)
		return nil, r.err
	}
	return bytes.TrimSuffix(line, []byte("\n")), nil
}

// endOf tells the end between lines from one inside a line.
func endOf(partial []byte, err error) error {
	if errors.Is(err, io.EOF) && len(partial) > 0 {
		return io.ErrUnexpectedEOF
	}
	return err
}

// A Writer writes control lines, each in one piece: those of concurrent callers
// never mix.
type Writer struct {
	mu  sync.Mutex
	w   io.Writer
	err error
}

// NewWriter returns a Writer to w.
func NewWriter(w io.Writer) *Writer { return &Writer{w: w} }

// Send writes the line of m with one Write call. A message that [Append] refuses
// leaves the stream as it was. After an error of the stream itself every call
// fails, since the reader could take the next line for a part of the broken one.
func (w *Writer) Send(m Message) error {
	line, err := Append(nil, m)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		_, w.err = w.w.Write(line)
	}
	return w.err
}
