package soak

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc64"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"
)

// A job is what one connection is for. Its header tells the far end.
//
//	download  the far end sends so many bytes and ends its direction
//	upload    this end sends them and ends its direction; the answer says what came
//	echo      both at once
type job struct {
	kind byte
	size uint64
	seed uint64
}

const (
	download byte = 'd'
	upload   byte = 'u'
	echo     byte = 'e'

	headerSize = 1 + 8 + 8
)

var kinds = []byte{download, upload, echo}

func (j job) String() string {
	return fmt.Sprintf("%s of %d bytes", map[byte]string{download: "a download", upload: "an upload", echo: "an echo"}[j.kind], j.size)
}

func (j job) header() []byte {
	b := binary.BigEndian.AppendUint64([]byte{j.kind}, j.size)
	return binary.BigEndian.AppendUint64(b, j.seed)
}

func parseHeader(b []byte) (job, error) {
	j := job{kind: b[0], size: binary.BigEndian.Uint64(b[1:]), seed: binary.BigEndian.Uint64(b[9:])}
	if !slices.Contains(kinds, j.kind) || j.size > maxSize {
		return j, errors.New("not a header of ours")
	}
	return j, nil
}

// bytes are those of the job, made from its seed.
func (j job) bytes() io.Reader {
	var seed [32]byte
	binary.BigEndian.PutUint64(seed[:], j.seed)
	return io.LimitReader(rand.NewChaCha8(seed), int64(j.size))
}

var table = crc64.MakeTable(crc64.ECMA)

// receive reads until the end of the stream and compares what came. An end that comes
// too early, and is not an error, is errIncomplete.
func (j job) receive(r io.Reader) (uint64, error) {
	want, got := crc64.New(table), crc64.New(table)
	n, err := io.Copy(got, struct{ io.Reader }{r})
	if err != nil {
		return uint64(n), err
	}
	_, _ = io.Copy(want, j.bytes()) // neither fails
	switch {
	case uint64(n) < j.size:
		return uint64(n), fmt.Errorf("%w: %d of %d bytes came", errIncomplete, n, j.size)
	case uint64(n) > j.size || got.Sum64() != want.Sum64():
		return uint64(n), fmt.Errorf("%w: other bytes came", errIncomplete)
	}
	return uint64(n), nil
}

// do is this end of the job. It returns the bytes that came, or were seen to arrive.
func (j job) do(conn Conn) (uint64, error) {
	if _, err := conn.Write(j.header()); err != nil {
		return 0, err
	}
	switch j.kind {
	case download:
		if err := conn.CloseWrite(); err != nil {
			return 0, err
		}
		return j.receive(conn)
	case upload:
		if err := send(conn, j); err != nil {
			return 0, err
		}
		answer, err := io.ReadAll(io.LimitReader(conn, 9))
		switch {
		case err != nil:
			return 0, err
		case len(answer) != 8:
			return 0, fmt.Errorf("%w: the answer to an upload has %d of 8 bytes", errIncomplete, len(answer))
		case binary.BigEndian.Uint64(answer) != j.size:
			return 0, fmt.Errorf("%w: %d of %d bytes arrived", errIncomplete, binary.BigEndian.Uint64(answer), j.size)
		}
		return j.size, nil
	}
	sent := make(chan error, 1)
	go func() { sent <- send(conn, j) }()
	n, err := j.receive(conn)
	if err != nil {
		_ = conn.Close() // what is still being sent goes nowhere
	}
	// A reset is reported once. If a Write has had it, a Read sees a clean end.
	if failed := <-sent; failed != nil && !errors.Is(failed, net.ErrClosed) {
		err = failed
	}
	return n, err
}

// send writes the job's bytes and ends the direction.
func send(conn Conn, j job) error {
	if _, err := io.CopyBuffer(struct{ io.Writer }{conn}, j.bytes(), make([]byte, 32<<10)); err != nil {
		return err
	}
	return conn.CloseWrite()
}

// far is the other end.
type far struct {
	patience time.Duration // for the bytes of one that has gone without a word

	mu    sync.Mutex
	lines []string
}

func (f *far) serve(l net.Listener) {
	var conns sync.WaitGroup
	defer conns.Wait()
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(10 * time.Millisecond) // out of descriptors for now: one of the faults
			continue
		}
		conns.Go(func() {
			defer conn.Close()
			tcp := conn.(*net.TCPConn)
			if !f.answer(&patient{tcp, f.patience}) {
				_ = tcp.SetLinger(0) // fails only if it is closed
			}
		})
	}
}

// answer does what the header says, and reports whether the stream was complete: if it
// was not, its other direction must not look so either. Streams of uploads that end
// cleanly and too early are lost ones: this end is the only one to know.
func (f *far) answer(conn Conn) bool {
	r := bufio.NewReader(conn)
	header := make([]byte, headerSize)
	if _, err := io.ReadFull(r, header); err != nil {
		return false // it was given up before it began
	}
	j, err := parseHeader(header)
	if err != nil {
		f.note(err.Error())
		return false
	}
	var n uint64
	switch j.kind {
	case download:
		return send(conn, j) == nil
	case upload:
		if n, err = j.receive(r); err == nil {
			_, err = conn.Write(binary.BigEndian.AppendUint64(nil, n))
		}
	case echo:
		back := bufio.NewWriterSize(conn, 32<<10)
		if _, err = j.receive(io.TeeReader(r, back)); err == nil {
			err = back.Flush()
		}
	}
	if errors.Is(err, errIncomplete) {
		f.note(fmt.Sprintf("%s, at the far end: %v", j, err))
	}
	return err == nil && conn.CloseWrite() == nil
}

func (f *far) note(line string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lines = append(f.lines, line)
}

func (f *far) lost() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.lines
}
