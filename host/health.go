package host

import (
	"fmt"
	"time"

	"github.com/clawvm/clawvm/host/gate"
)

// heedHealth takes note of a health check. What the guest can repeat as it likes
// is logged when it changes, and no oftener than once in healthLogged.
func (l *life) heedHealth(m gate.Message) {
	before := l.Status().Check
	c := &HealthCheck{Time: time.Now().UTC(), Failures: m.Failures, Unhealthy: m.Unhealthy, Answer: m.Detail}
	l.update(func(st *Status) { st.Check = c })
	if was := before != nil && before.Unhealthy; was == c.Unhealthy || time.Since(l.healthSaid) < healthLogged {
		return
	}
	l.healthSaid = time.Now()
	if c.Unhealthy {
		l.logf("the workload is unhealthy: %s", c)
	} else {
		l.logf("the workload is healthy again")
	}
}

const healthLogged = time.Second

// String is a check that failed, in words.
func (c *HealthCheck) String() string {
	times := fmt.Sprintf("%d checks failed", c.Failures)
	if c.Failures == 1 {
		times = "1 check failed"
	}
	return times + ", the last answer: " + c.Answer
}

// restartsSick says whether a guest that doesn't answer is to be started again: as
// an unhealthy workload is, when that is declared. Otherwise it is left alone, for
// what it serves may well go on.
func (l *life) restartsSick() bool { return l.vm.Health != nil && l.vm.Health.Restart && !l.paused }
